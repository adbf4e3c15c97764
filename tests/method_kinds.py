"""One method of every kind of code, for tests that train each."""

KINDS = (
    *("float32", "fp16", "bf16", "auto", "3LC density 5 %"),
    *("3LC s=1.00", "3LC s=1.75", "3LC s=1.90", "3LC s=1.00, direct"),
    *("3LC s=1.00, all coded", "3LC s=1.75, block 1024", "3LC s=1.75, pull s=1.00"),
    *("3LC s=1.00, rans", "3LC s=1.75, rans"),
    *("8-bit int", "Stoch 3-value + QE", "MQE 1-bit int", "top-k 1%"),
    *("25% sparsification", "5% sparsification", "PowerSGD rank 1", "PowerSGD rank 4"),
    *("preconditioned s=1.00, rans", "preconditioned s=1.00, direct"),
    *("push-pull s=1.00", "local H=2, uncoded", "local H=8", "local H=8, direct"),
    "local H=8, density 11.5 %, all coded, decay 0.8, rans, momentum 0.5, outer rate 2",
    *("DiLoCo H=8", "DiLoCo E3M0 H=8", "SparseLoCo H=8", "MuLoCo 2 bit H=8"),
    *("MuLoCo 4 bit H=8", "DeMo", "1-bit Adam", "EF21-Muon", "post-local SGD H=8"),
)
