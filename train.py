"""Train a Llama-like model: torchrun train.py --job.config_file configs/X.toml [--section.key value ...]"""

from dtron.train.launch import main

if __name__ == "__main__":
    main()
