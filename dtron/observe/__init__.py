"""What a run tells: metrics.jsonl and TensorBoard, console lines, device facts, profiler traces."""
