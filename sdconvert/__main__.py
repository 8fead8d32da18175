"""`python -m sdconvert` is the command `sdconvert`."""

from sdconvert.cli.app import main

if __name__ == "__main__":
    main()
