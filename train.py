"""Train a recipe: `deepspeed train.py --deepspeed_config ds_configs/a6000.json` (see --help)."""

import sys

from inheritune_ds.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
