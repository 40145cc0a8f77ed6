"""What a score is: accuracy, recall, average precision, their intervals, parity of two models' rows."""
