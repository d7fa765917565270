"""`python -m fastkd` is the command `fastkd`."""

from fastkd.commands.app import main

if __name__ == "__main__":
    main()
