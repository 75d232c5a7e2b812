"""The processes of a run as a group: who they are, what they agree on, how they stop, fail and are watched."""
