"""All mutants. The texts are exact; where the product's code moves on, they have to follow, and `run.py` says so."""

from __future__ import annotations

from tests.mutants import of_cloud, of_hand_off, of_store, of_workers

MUTANTS = (*of_store.MUTANTS, *of_workers.MUTANTS, *of_cloud.MUTANTS, *of_hand_off.MUTANTS)
