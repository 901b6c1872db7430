//! Makes a failing case as small as it stays failing.

use crate::case::*;
use iced_x86::{Decoder, DecoderOptions};

/// Variants of `case` with one thing less.
fn simpler(case: &Case) -> Vec<Case> {
    let mut all = Vec::new();
    let mut try_it = |change: &dyn Fn(&mut Case)| {
        let mut c = *case;
        change(&mut c);
        all.push(c);
    };
    // Instructions one by one.
    let mut decoder = Decoder::with_ip(case.bits, case.bytes(), case.regs.rip, DecoderOptions::NONE);
    let mut bounds = Vec::new();
    while decoder.can_decode() {
        let i = decoder.decode();
        bounds.push(((i.ip() - case.regs.rip) as usize, i.len()));
    }
    if bounds.len() > 1 {
        for (at, len) in bounds {
            try_it(&|c| {
                let old = *c;
                let rest = old.code_len as usize - at - len;
                c.code[at..at + rest].copy_from_slice(&old.code[at + len..at + len + rest]);
                c.code[at + rest..].fill(0xcc);
                c.code_len -= len as u32;
            });
        }
    }
    let plain = Regs::plain();
    if case.regs.rflags != plain.rflags {
        try_it(&|c| c.regs.rflags = plain.rflags);
        for bit in [0, 2, 4, 6, 7, 8, 10, 11] {
            if case.regs.rflags >> bit & 1 != 0 {
                try_it(&|c| c.regs.rflags &= !(1 << bit));
            }
        }
    }
    for n in 0..16 {
        if case.regs.gpr[n] != 0 {
            try_it(&|c| c.regs.gpr[n] = 0);
            if case.regs.gpr[n] > 0xff {
                try_it(&|c| c.regs.gpr[n] &= 0xff);
                try_it(&|c| c.regs.gpr[n] &= 0xffff_ffff);
            }
        }
        if case.regs.vec[n] != [0; 32] {
            try_it(&|c| c.regs.vec[n] = [0; 32]);
            try_it(&|c| c.regs.vec[n][16..].fill(0));
            for lane in 0..4 {
                if case.regs.vec[n][lane * 8..lane * 8 + 8] != [0; 8] {
                    try_it(&|c| c.regs.vec[n][lane * 8..lane * 8 + 8].fill(0));
                }
            }
        }
    }
    for n in 0..8 {
        if case.regs.st[n] != [0; 10] {
            try_it(&|c| c.regs.st[n] = [0; 10]);
        }
    }
    try_it(&|c| c.regs.mxcsr = plain.mxcsr);
    try_it(&|c| c.regs.mxcsr &= !0x3f);
    try_it(&|c| c.regs.fcw = plain.fcw);
    try_it(&|c| c.regs.fsw = 0);
    try_it(&|c| c.regs.ftw = 0);
    if case.regs.ftw != 0 {
        try_it(&|c| c.regs.ftw = 0xff);
    }
    try_it(&|c| (c.regs.fip, c.regs.fdp, c.regs.fop) = (0, 0, 0));
    try_it(&|c| c.pattern = 0);
    try_it(&|c| c.patch_len = 0);
    all.retain(|c| differs(c, case));
    all
}

fn differs(a: &Case, b: &Case) -> bool {
    a.regs != b.regs
        || a.code != b.code
        || a.code_len != b.code_len
        || a.pattern != b.pattern
        || a.patch_len != b.patch_len
}

/// Shrinks with the given test of failure.
pub fn shrink(case: &Case, mut fails: impl FnMut(&Case) -> bool) -> Case {
    let mut best = *case;
    for _ in 0..8 {
        let mut better = false;
        let mut tried = 0;
        loop {
            let variants = simpler(&best);
            let Some(next) = variants.into_iter().skip(tried).find(|c| {
                tried += 1;
                fails(c)
            }) else {
                break;
            };
            tried = tried.saturating_sub(1);
            best = next;
            better = true;
        }
        if !better {
            break;
        }
    }
    best
}
