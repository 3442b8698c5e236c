# make demo     train a small self-explaining model and look at its explanations
# make test     run the tests, with a Chromium that it installs where there is none;
#               PYTEST_ARGS="tests/training/test_losses.py -k paired" runs some of them
# make lint     check style, types, dead code and layout
# make coverage run the tests, show the lines of src/ that none reaches, and refuse less than 95 % of them
# make quality  lint, docs and coverage: everything that must hold before a change goes in
# make audit    ask for known vulnerabilities of the pinned dependencies; needs the package index's own service
# make docs     build the documentation into site/
# make test-oldest run the tests with the oldest supported versions, in an environment of their own
# make clean    remove caches and build products, keep .venv and outputs
.DEFAULT_GOAL := test
.NOTPARALLEL:
.PHONY: demo test test-oldest lint coverage quality audit docs clean

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
PYTEST_ARGS ?=
MIN_COVERAGE ?= 95

# One thread per test process: more only fight for the cores.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
BIN := $(VENV)/bin
SOURCES := src tests $(wildcard examples benchmarks)

# Names that Hugging Face, torch or Python calls, not we.
HOOKS := __class__,__dir__,__getattr__,_compute,_forward,_info,_init_weights,_issue_warnings_after_load,$\
	_sanitize_parameters,_save_optimizer_and_scheduler,accepts_loss_kwargs,can_return_loss,card_data_class,$\
	compute_metrics,convnextv2,default_template_path,do_*,exception,generate_vmap_rule,handle_*,head,hub_private_repo,$\
	input_modalities,intra_op_num_threads,keys_to_ignore_at_inference,log_message,loss_is_scaled_for_ga,$\
	main_input_name,momentum,on_*,post_processor,pre_tokenizer,protocol_version,pytest_*,pytestmark,$\
	remove_unused_columns,save_strategy,set_shift_and_window_size,setup_context,sub_configs,$\
	supports_gradient_checkpointing

# A server that finds its handlers by address, what tests run as processes of their own, and what transformers' tests ask.
CALLED_BY_NAME := */tests/hub_*.py,*/benchmarks/model_tester.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Not an extra of the package: it only makes `make test` faster.
TOOLS_test := pytest-xdist

# .installed-EXTRA says that the package and this extra are installed as setup.cfg and constraints.txt want them.
$(VENV)/.installed-%: setup.cfg constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --no-compile -c constraints.txt torch -e '.[$*]' $(TOOLS_$*)
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true  # pip would compile on one core; a few files are for no Python
	touch $@

# Of few images, so that it ends soon; README's figures are of the command's own 32.
demo: $(VENV)/.installed-plot
	$(BIN)/hf-shapley demo --images 12

test: $(VENV)/.installed-test
	$(BIN)/python tests/browser.py
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup $(PYTEST_ARGS)

$(VENV)-oldest/.installed: setup.cfg constraints-oldest.txt
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install -c constraints-oldest.txt torch -e '.[test]' $(TOOLS_test)
	touch $@

test-oldest: $(VENV)-oldest/.installed
	$(VENV)-oldest/bin/python tests/browser.py
	$(TEST_ENV) $(VENV)-oldest/bin/python -m pytest -n $(JOBS) --dist loadgroup $(PYTEST_ARGS)

# Some of the tests reach some of the lines: only all of them together are held to the limit.
coverage: $(VENV)/.installed-test
	$(BIN)/python tests/browser.py
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup --cov \
		$(if $(strip $(PYTEST_ARGS)),$(PYTEST_ARGS),--cov-fail-under=$(MIN_COVERAGE))

lint: $(VENV)/.installed-quality $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/vulture --min-confidence 60 --ignore-names '$(HOOKS)' --ignore-decorators '@pytest.fixture*' \
		--exclude '$(CALLED_BY_NAME)' $(SOURCES)
	$(BIN)/python -m pytest --quiet --noconftest tests/test_layout.py

# The tests run once, under coverage.
quality: lint docs coverage

# A package that the service does not know counts as a failure, not as harmless.
audit: $(VENV)/.installed-quality
	$(BIN)/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r constraints.txt

# The theme would print its opinion of the next MkDocs.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf build dist site .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
