"""Networks, plain torch modules that know nothing of what is done with them."""

from landscape.models.mlp import mlp as mlp
