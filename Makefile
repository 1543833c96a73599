# Two targets for people: `make demo` and `make test`. Both make their own environment first.
#   D2    the engine: ./lite (default), a path to a detectron2 checkout, or a pip requirement such as
#         git+https://github.com/facebookresearch/detectron2.git
#   VENV  where the environment lives; one environment holds one engine
#   EXTRAS  of this package, see setup.py
#   TORCH_INDEX  address of torch's own index of CPU-only builds, for Linux, where the ordinary ones bring CUDA along
#   ARGS  passed on, e.g. make demo ARGS="--data DIR", make test ARGS="-m slow"
PYTHON ?= python3
VENV ?= .venv
D2 ?= ./lite
EXTRAS ?= test,fast-eval
TORCH_INDEX ?=
ARGS ?=

PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
# Python compiles what it imports: a fraction of what pip would compile, on one core. It must be let keep that: without
# it every process would compile anew, for longer than it imports.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(PIP) install -q --no-compile -c constraints.txt
ENGINE_ID := $(shell printf '%s' '$(D2)' | cksum | cut -d' ' -f1)
BASE := $(VENV)/.base
ENGINE := $(VENV)/.engine-$(ENGINE_ID)

.PHONY: demo test lint install clean

demo: install
	$(VENV)/bin/python tools/quickstart.py $(ARGS)

# A process a core, each with one thread.
test: install
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --dist loadfile $(ARGS)

lint: install
	$(VENV)/bin/python -m ruff check .

install: $(ENGINE)

# torch comes first and alone: building detectron2 needs it.
$(BASE): setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python >= 3.10 is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) setuptools wheel
	$(if $(TORCH_INDEX),$(INSTALL) --index-url '$(TORCH_INDEX)' torch torchvision)
	$(INSTALL) -e '.[$(EXTRAS)]'
	rm -f $(VENV)/.engine-*
	touch $@

$(ENGINE): $(BASE) $(wildcard lite/setup.py)
	$(PIP) uninstall -q -y detectron2 detectron2-lite
	rm -f $(VENV)/.engine-*
	$(INSTALL) --no-build-isolation --use-pep517 $(if $(wildcard $(D2)/setup.py),-e )'$(D2)'
	touch $@

clean:
	rm -rf $(VENV) output
