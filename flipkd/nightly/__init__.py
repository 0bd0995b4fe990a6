"""One night after another: encode what changed, score, compare with the last night, and release or hold the scores."""
