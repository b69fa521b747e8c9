"""The peers, in the order they are measured."""

from benchmarks.peers import bentoml, infinity, kserve, litserve, mlserver, pytriton, ray

PEERS = (
    kserve.PEER,
    pytriton.PEER,
    mlserver.PEER,
    litserve.PEER,
    infinity.PEER,
    bentoml.PEER,
    ray.PEER,
)
