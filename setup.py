"Packaging: everything that can differ from project to project is read from settings.ini, nothing from the package."
import ast, shutil
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).resolve().parent
cfg = ConfigParser(delimiters=['='])
cfg.read(here/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
statuses = ['1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable', '6 - Mature', '7 - Inactive']
pythons = [f'3.{minor}' for minor in range(int(cfg['min_python'].split('.')[1]), 14)]

class WithSmallFiles(build_py):
    "Copies the small files that the notebooks read into the package; `ala_nb.files.shipped` finds them there, or in a clone."
    def run(self):
        super().run()
        if self.editable_mode: return
        source = (here/cfg['lib_path']/'files.py').read_text(encoding='utf-8')     # not imported: the package's requirements are not there yet
        where = next(n.value for n in ast.parse(source).body if isinstance(n, ast.Assign) and getattr(n.targets[0], 'id', '') == 'IN_CLONE')
        for name, folder in {k.arg: k.value.value for k in where.keywords}.items():
            shutil.copytree(here/folder, Path(self.build_lib)/cfg['lib_path']/'shipped'/name, dirs_exist_ok=True)

setup(
    cmdclass=dict(build_py=WithSmallFiles),
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
    extras_require={k: cfg[k+'_requirements'].split() for k in ('fast', 'log', 'timm', 'notebooks', 'dev')},
    entry_points={'nbdev': [f'{cfg["lib_path"]}={cfg["lib_path"]}._modidx:d']},  # lets nbdev link symbols to these notebooks
    zip_safe=False,
)
