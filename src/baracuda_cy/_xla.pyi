# SPDX-License-Identifier: Apache-2.0
from baracuda_cy.plan import Plan

def call_of(plan: Plan, bias: bool, block_size: int, offset: float) -> tuple[str, bytes]: ...
