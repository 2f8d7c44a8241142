# `make` after every change of a notebook: modules, clean notebooks and README.md in step. `make test` as in the README.
PYTHON ?= python

prepare: export clean-notebooks readme
export:           ## ala_nb/*.py from the notebooks
	nbdev_export
clean-notebooks:  ## drop metadata and counters, keep outputs
	nbdev_clean
readme:           ## README.md from nbs/index.ipynb
	$(PYTHON) scripts/readme.py
test:             ## every notebook top to bottom, then the test files
	OMP_NUM_THREADS=1 nbdev_test --n_workers 2
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2
site:             ## the notebooks as a web site in _site, links checked
	$(PYTHON) scripts/book.py --out _site
wheel:            ## dist/*.whl, to hand on: pip install dist/*.whl
	$(PYTHON) -m pip wheel --no-deps --wheel-dir dist .

.PHONY: prepare export clean-notebooks readme test site wheel
