"""What a person looks at: metrics, progress bars, TensorBoard, the summary and one HTML page per run."""
