"""Data sets and samplers."""

from landscape.data.dataset import BatchList as BatchList
from landscape.data.dataset import Examples as Examples
from landscape.data.dataset import IndexedData as IndexedData
from landscape.data.dataset import MapData as MapData
from landscape.data.dataset import TensorData as TensorData
from landscape.data.sampling import IndexSampler as IndexSampler
from landscape.data.selection import choose as choose
