"""Train a recipe: `deepspeed train.py --deepspeed_config ds_configs/a6000.json` (see --help)."""

import sys

if __name__ == "__main__":
    try:
        from inheritune_ds.cli import main
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(main(["train", *sys.argv[1:]]))
