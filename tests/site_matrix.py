"""Every form, optimizer, overlap and number of fragments and sites, to the same bits.

    python -m tests.site_matrix

``test_sites`` tries some of these; this all of them, and prints how many were equal.
"""

import itertools

from tests.ranks import Ranks
from tests.test_sites import compare, knobs_of


def main() -> None:
    """Compare all; an error ends it."""
    pools = {world: Ranks(world) for world in (2, 3, 4, 6)}
    found = 0
    for sites, form, kind, overlap, fragments in itertools.product(
        (2, 3), ("fsdp2", "ddp"), ("sgd", "adamw", "muon"), (0, 3), (1, 3)
    ):
        compare(pools.__getitem__, sites, form, kind, knobs_of(overlap, fragments))
        found += 1
        print(
            f"{sites} sites of 2 ranks, {form}, {kind}, overlap {overlap}, "
            f"fragments {fragments}: equal",
            flush=True,
        )
    print(f"{found} of {found} equal")
    for pool in pools.values():
        pool.close()


if __name__ == "__main__":
    main()
