"""The operator behind Eq. 5-7, in torch only: samples of maps, correlations, and how a CPU and a GPU compute them."""
