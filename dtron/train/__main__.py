"""`torchrun -m dtron.train` is train.py for an installed package."""

from dtron.train.launch import main

if __name__ == "__main__":
    main()
