"""train.py with a shorter wait of the silent ranks, for runs without torchrun, which would end them sooner."""

from dtron.ranks import failure, world
from dtron.train import launch

if __name__ == "__main__":
    failure.SILENT_WAIT_S = world.SILENT_WAIT_S = 4.0
    launch.main()
