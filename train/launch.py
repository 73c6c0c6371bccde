"""`accelerate launch` that ends as the run ended: with its status, and no traceback of the launcher's own behind it.

    python train/launch.py --config_file train/accelerate/zero2.yaml train/sft.py --config mine.yaml

The options are those of `accelerate launch`. train/run.py starts its stages with it.
"""

import subprocess

from accelerate.commands.launch import main as accelerate_launch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> None:
    try:
        accelerate_launch()
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
    except subprocess.CalledProcessError as error:
        status = error.returncode
    else:
        return
    raise SystemExit(status if status >= 0 else 128 - status)  # killed by a signal: as shells say it


if __name__ == "__main__":
    main()
