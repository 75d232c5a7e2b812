"""What a run reports: metrics.jsonl and TensorBoard, console lines, device facts, profiler traces."""
