"""The linear probe: multinomial logistic regression to a stated gradient norm, splits, the sweep over C."""
