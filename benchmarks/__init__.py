"""Speed and memory of patched models against stock and peers: one script per question, raw rows in results/."""
