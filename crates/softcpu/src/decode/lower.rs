//! From a decoded instruction to an operation: asks each family in turn.

use super::Flow;
use super::operand::{Ctx, Kind, implied, kind, memory};
use crate::interp;
use crate::native;
use crate::op::Op;
use iced_x86::{Instruction, OpKind};

/// Fills in `op` for `i`, decoded from `bytes`. What no family knows raises #UD.
pub(super) fn lower(ctx: &Ctx<'_>, i: &Instruction, bytes: &[u8], op: &mut Op) -> Flow {
    let ops = i.op_count();
    if (0..ops).any(|n| kind(i, n) == Kind::Mem) {
        memory(ctx, i, op);
    } else if (0..ops).any(|n| is_implied(i.op_kind(n))) {
        implied(i, op);
    }
    if let Some(flow) = interp::lower(ctx, i, op) {
        return flow;
    }
    if native::lower(i, bytes, ctx.mode, ctx.arena, op) {
        return Flow::Continue;
    }
    op.handler = interp::undefined;
    Flow::End
}

fn is_implied(k: OpKind) -> bool {
    use OpKind::*;
    matches!(
        k,
        MemorySegSI
            | MemorySegESI
            | MemorySegRSI
            | MemorySegDI
            | MemorySegEDI
            | MemorySegRDI
            | MemoryESDI
            | MemoryESEDI
            | MemoryESRDI
    )
}
