"""Run the command line as a module, which is how torchrun starts it: ``torchrun … -m clipcid_cli balance …``."""

from clipcid_cli.cli import main

if __name__ == "__main__":
    main()
