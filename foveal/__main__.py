"""``python -m foveal``: the `foveal` command."""

from .cli import main

if __name__ == "__main__":
    main()
