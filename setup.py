"Packaging: everything that can differ from project to project is read from settings.ini, nothing from the package."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).resolve().parent
cfg = ConfigParser(delimiters=['='])
cfg.read(here/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
statuses = ['1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable', '6 - Mature', '7 - Inactive']
pythons = [f'3.{minor}' for minor in range(int(cfg['min_python'].split('.')[1]), 14)]

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=(here/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author=cfg['author'],
    license='Apache-2.0',
    license_files=['LICENSE'],
    keywords=cfg['keywords'].split(),
    classifiers=[f'Development Status :: {statuses[int(cfg["status"])-1]}', f'Intended Audience :: {cfg["audience"]}',
                 f'Natural Language :: {cfg["language"]}', 'Topic :: Scientific/Engineering :: Image Recognition',
                 *[f'Programming Language :: Python :: {v}' for v in pythons]],
    packages=find_packages(include=[cfg['lib_path'], cfg['lib_path']+'.*']),
    package_data={cfg['lib_path']: ['py.typed', 'shipped/*']},
    python_requires='>='+cfg['min_python'],
    install_requires=cfg['requirements'].split(),
    extras_require={'fast': cfg['fast_requirements'].split(), 'notebooks': cfg['notebooks_requirements'].split(), 'dev': cfg['dev_requirements'].split()},
    entry_points={'nbdev': [f'{cfg["lib_path"]}={cfg["lib_path"]}._modidx:d']},  # lets nbdev link symbols to these notebooks
    zip_safe=False,
)
