"""Measure how faithful a model's attributions are to what the model does when patches are really removed.

With no argument, a small model first learns scikit-learn's digits (seconds on the CPU):

    python examples/evaluate_faithfulness.py

The real thing: a Shapley checkpoint and a data set, each a folder or a Hub id:

    python examples/evaluate_faithfulness.py \
        --model outputs/food101 --dataset ethz/food101 --split validation --images 100 --budget 8192

The model's attributions come from one forward pass. Beside them stand two rivals that rank the same patches: leaving
out one patch at a time (one forward pass per patch), and chance. The certificate at the end says how far the
attributions are from the exact Shapley values, with a confidence interval, although those are never computed.
`hf-shapley evaluate` takes the same options; the steps are the functions of `hf_shapley.jobs.evaluation_job`.
"""

import argparse

from hf_shapley.jobs.evaluation_job import add_arguments, run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    run(parser.parse_args())
