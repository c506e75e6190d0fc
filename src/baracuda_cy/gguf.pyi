# SPDX-License-Identifier: Apache-2.0
from typing import Any, final

from baracuda_cy.descriptors import (
    GgufDequantizeDescriptor,
    GgufMmvqDescriptor,
    GgufMmvqMultiMDescriptor,
    PlanPreference,
)
from baracuda_cy.plan import Plan

class GgufProductPlan(Plan):
    def run(
        self,
        weight: Any,
        activations: Any,
        output: Any,
        *,
        bias: Any = None,
        workspace: Any = None,
        stream: Any = None,
    ) -> None: ...
    def validate(self, weight: Any, activations: Any, output: Any, *, bias: Any = None) -> None: ...
    def can_implement(
        self, weight: Any, activations: Any, output: Any, *, bias: Any = None
    ) -> bool: ...

@final
class GgufMmvqPlan(GgufProductPlan):
    @classmethod
    def select(
        cls, device: Any, desc: GgufMmvqDescriptor, preference: PlanPreference | None = None
    ) -> GgufMmvqPlan: ...

@final
class GgufMmvqMultiMPlan(GgufProductPlan):
    @classmethod
    def select(
        cls, device: Any, desc: GgufMmvqMultiMDescriptor, preference: PlanPreference | None = None
    ) -> GgufMmvqMultiMPlan: ...

@final
class GgufDequantizePlan(Plan):
    @classmethod
    def select(
        cls, device: Any, desc: GgufDequantizeDescriptor, preference: PlanPreference | None = None
    ) -> GgufDequantizePlan: ...
    def run(
        self, weight: Any, output: Any, *, workspace: Any = None, stream: Any = None
    ) -> None: ...
    def validate(self, weight: Any, output: Any) -> None: ...
    def can_implement(self, weight: Any, output: Any) -> bool: ...

def select_product(
    host: bool,
    ordinal: int,
    block_format: int,
    nrows: int,
    ncols: int,
    m: int,
    activation: int,
    output: int,
    preference: PlanPreference | None,
) -> GgufMmvqPlan | GgufMmvqMultiMPlan: ...
