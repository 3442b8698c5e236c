"""Train, evaluate and use a Shapley image classifier on any `datasets` data set with an image and a label column.

With no argument, a small classifier learns scikit-learn's digits from scratch on the CPU within seconds:

    python examples/run_shapley_image_classification.py

Fine-tune a plain checkpoint of the Hub on a data set of the Hub:

    python examples/run_shapley_image_classification.py \
        --model google/vit-base-patch16-224-in21k --dataset ethz/food101 --output_dir outputs/food101 \
        --horizontal_flip --random_crop 0.5 --learning_rate 5e-5 --num_train_epochs 8 \
        --per_device_train_batch_size 32 --dataloader_num_workers 4 --bf16 --do_train --do_eval --push_to_hub

The defaults suit a plain checkpoint that goes on learning.

On several devices, or several machines, put `accelerate launch` in the place of `python` (`accelerate config` asks
about the machine once). To try it without any GPU: `accelerate launch --multi_gpu --num_processes 2 ... --use_cpu`;
accelerate's own `--cpu` would start one process only.

`--dataset` takes a Hub id, a folder with one sub-folder of pictures per label, or what `save_to_disk` wrote.
`--resume_from_checkpoint last` continues where the run in `--output_dir` stopped. One `.json` file may hold all of the
options.
Needs no torchvision: augmentation is a crop and a flip done by Pillow. `hf-shapley train` takes the same options; the
steps are the functions that `hf_shapley.jobs.training_job` imports, to take and rearrange.
"""

import sys

from hf_shapley.jobs.training_job import main

if __name__ == "__main__":
    main(sys.argv[1:])
