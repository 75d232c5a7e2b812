"""Runs side by side: `dtron compare`."""
