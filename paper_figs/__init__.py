"""Scripts that draw the figures and tables of the paper, one each."""
