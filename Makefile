# Only Python 3.10+ is needed: each target sets up .venv once, and updates it when pyproject.toml changes.
PYTHON ?= python3
PIP_FLAGS ?=
BIN := .venv/bin
FASHION := data/fashion-mnist
# Tests run in parallel with one thread each: two processes with two threads each on two cores are many times slower.
# A worker that dies ends the run: pytest-xdist starts another, but may give it no tests and wait for ever.
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 8 ? n : 8)))
SIDE_BY_SIDE := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0

.PHONY: help demo demo-detect demo-segment test test-slow test-long bench docs pictures fashion-mnist tuxpaint-coco clean

help:
	@echo "make demo           train on handwritten digits, evaluate, plot, export, predict (set-up + 5 minutes)"
	@echo "make demo-detect    train a detector on digits composited on photographs (set-up + 10 minutes)"
	@echo "make demo-segment   the same for a segmenter"
	@echo "make test           lint and run the default tests"
	@echo "make test-slow      run the slow tests, some minutes each (needs: make fashion-mnist)"
	@echo "make test-long      run the detection and segmentation demos and check their scores"
	@echo "make bench          benchmark the kernels"
	@echo "make docs           build the site into build/site"
	@echo "make fashion-mnist  download Fashion-MNIST into $(FASHION)"
	@echo "make tuxpaint-coco  compose Tux Paint's stamps and photographs into a COCO dataset in $(TUXPAINT)"
	@echo "make clean          remove .venv and build outputs; keep runs/ and data/"
	@echo "PYTHON=... selects the interpreter (now: $(PYTHON))"

demo: .venv/ready
	$(BIN)/foveal demo

demo-detect demo-segment: demo-%: .venv/ready
	$(BIN)/foveal demo $*

test: .venv/ready-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(SIDE_BY_SIDE)  # not python -m pytest: with this folder on sys.path, transformers imports our kernels/ as its optional dependency

test-slow: .venv/ready-test
	$(SIDE_BY_SIDE) -m 'slow and not long' --ignore tests/train/test_fashion_mnist.py
	$(BIN)/pytest -m slow tests/train/test_fashion_mnist.py  # separately: it trains on both cores

test-long: .venv/ready-test
	$(BIN)/pytest -m long

bench: .venv/ready-test
	$(BIN)/foveal bench kernels

docs: .venv/ready-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "build/site/index.html"

pictures: .venv/ready  # redraw the README images, after a change of the tables that they show
	$(BIN)/python -m foveal.pictures docs/pictures

.venv/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "foveal needs Python 3.10 or newer, '$(PYTHON)' is older. Try: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "'$(PYTHON)' cannot create virtual environments. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "setting up .venv (downloads PyTorch, takes some minutes)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_FLAGS) --editable '.[train,export]'
	@touch $@

# The tests compare with NATTEN, whose build needs the installed torch. The MMDetection adapter is tested without
# MMDetection's own requirements (a compiled mmcv, opencv with GUI).
.venv/ready-test: .venv/ready
	$(BIN)/python -m pip install $(PIP_FLAGS) --editable '.[dev]'
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-build-isolation 'natten>=0.21'
	$(BIN)/python -m pip install $(PIP_FLAGS) addict==2.4.0 termcolor==3.3.0 yapf==0.43.0 six==1.17.0 terminaltables==3.1.10 \
	  shapely opencv-python-headless numba
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps mmengine==0.10.7 mmcv-lite==2.1.0 mmdet==3.3.0 imagecorruptions-imaug==1.1.5
	@touch $@

# Debian's package dataset-fashion-mnist (MIT licence), unpacked without installing it.
define FASHION_SHA256
b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7  train-images-idx3-ubyte.gz
0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056  train-labels-idx1-ubyte.gz
cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa  t10k-images-idx3-ubyte.gz
8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05  t10k-labels-idx1-ubyte.gz
endef
export FASHION_SHA256

fashion-mnist: $(FASHION)/SHA256SUMS

$(FASHION)/SHA256SUMS:
	@mkdir -p $(FASHION)
	@if [ ! -f $(FASHION)/train-images-idx3-ubyte.gz ]; then \
	  if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then \
	    echo "Fashion-MNIST is downloaded from Debian's package dataset-fashion-mnist, but this is not a Debian system." >&2; \
	    echo "Put these four files into $(FASHION)/ (https://github.com/zalandoresearch/fashion-mnist) and try again:" >&2; \
	    echo "$$FASHION_SHA256" | sed 's/^[^ ]*/ /' >&2; \
	    exit 1; \
	  fi; \
	  set -e; scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; chmod 755 "$$scratch"; \
	  ( cd "$$scratch"; apt-get -q -o APT::Sandbox::User=root download dataset-fashion-mnist \
	    || { [ "$$(id -u)" = 0 ] && apt-get -q update && apt-get -q -o APT::Sandbox::User=root download dataset-fashion-mnist; } \
	    || { echo "apt-get cannot find dataset-fashion-mnist; run 'apt-get update' as root and try again" >&2; exit 1; } ); \
	  dpkg-deb -x "$$scratch"/dataset-fashion-mnist_*.deb "$$scratch"; \
	  cp "$$scratch"/usr/share/datasets/fashion-mnist/*-ubyte.gz $(FASHION)/; \
	fi
	@cd $(FASHION) && echo "$$FASHION_SHA256" > SHA256SUMS.new && sha256sum --check SHA256SUMS.new \
	  || { rm -f SHA256SUMS.new; echo "checksum mismatch in $(FASHION); remove the files and try again" >&2; exit 1; }
	@mv $(FASHION)/SHA256SUMS.new $@
	@echo "Fashion-MNIST is in $(FASHION)"

TUXPAINT := data/tuxpaint-coco

# Debian's packages tuxpaint-stamps-default and tuxpaint-data (GPL-2), unpacked without installing them. The versions are
# pinned so that everyone gets the same composites.
TUXPAINT_PACKAGES := tuxpaint-data=1:0.9.28-sdl2-1 tuxpaint-stamps-default=2022.06.04-1
define TUXPAINT_SHA256
6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34
f5d0de8f9a70d2efc1241d19f26168cb8bf279f1b77abd3631e7a1a55c40e5e5
endef
export TUXPAINT_SHA256

tuxpaint-coco: $(TUXPAINT)/manifest.json

$(TUXPAINT)/manifest.json: | .venv/ready
	@set -e; scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; chmod 755 "$$scratch"; \
	if ! command -v dpkg-deb >/dev/null; then \
	  echo "The stamps and photographs come from Debian packages; dpkg-deb is needed to unpack them." >&2; \
	  exit 1; \
	fi; \
	if [ -d data/tuxpaint ]; then \
	  cp data/tuxpaint/*.deb "$$scratch"; \
	else ( cd "$$scratch"; apt-get -q -o APT::Sandbox::User=root download $(TUXPAINT_PACKAGES) \
	  || { [ "$$(id -u)" = 0 ] && apt-get -q update && apt-get -q -o APT::Sandbox::User=root download $(TUXPAINT_PACKAGES); } \
	  || { echo "apt-get cannot find $(TUXPAINT_PACKAGES) (Debian 12); run 'apt-get update' as root, or put" >&2; \
	    echo "the two files from https://snapshot.debian.org into data/tuxpaint/, and try again" >&2; exit 1; } ); \
	fi; \
	[ "$$(sha256sum "$$scratch"/*.deb | cut -d' ' -f1 | sort)" = "$$TUXPAINT_SHA256" ] \
	  || { echo "checksum mismatch for $(TUXPAINT_PACKAGES):" >&2; sha256sum "$$scratch"/*.deb >&2; exit 1; }; \
	for package in "$$scratch"/*.deb; do dpkg-deb -x "$$package" "$$scratch/unpacked"; done; \
	$(BIN)/python -m foveal.train.data.composites "$$scratch/unpacked" $(TUXPAINT)
	@echo "Tux Paint's stamps on its photographs are in $(TUXPAINT)"

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
