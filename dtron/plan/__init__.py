"""Planning without GPUs: what a layout would hold, send and compute on any rank of any world."""
