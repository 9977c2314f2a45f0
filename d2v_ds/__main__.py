"""`python -m d2v_ds`, and the command `d2v-ds`: holds stop signals, then runs cli.main."""

import sys

from d2v_ds.distributed import signals


def main() -> int:
    if sys.argv[1:2] in (["train"], ["finetune"]) and "--check" not in sys.argv:
        signals.hold()  # before the imports of the command
    from d2v_ds.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
