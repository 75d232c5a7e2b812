"""What a layout does, shown before a GPU hour: `dtron explain`."""
