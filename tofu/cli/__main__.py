"""Run the command line as `python -m tofu.cli`."""

from tofu.cli import main

if __name__ == "__main__":
    main()
