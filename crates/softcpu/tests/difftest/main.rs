//! The software CPU against the processor it runs on.
//!
//! Random instructions with random registers and memory are executed by the processor itself, in a child process, and by
//! the software CPU; registers, defined flags, memory and exceptions must agree. Every instruction that the software
//! CPU's CPUID promises is among them. A failing case is shrunk and printed. The software CPU takes part twice, as
//! interpreter and as translator (`KVASIR_DIFF_EXECUTORS` names those wanted).
//!
//! `KVASIR_DIFF_CASES` sets the number of cases over all families (default: one million), `KVASIR_DIFF_SEED` the seed,
//! `KVASIR_DIFF_ONLY` restricts the run to instructions whose name (as iced-x86 spells its `Code`) contains the text.

// Everything here serves tests: what must not fail, panics.
#![allow(clippy::unwrap_used)]

mod case;
#[path = "../common/mod.rs"]
mod common;
mod compare;
mod generate;
mod native;
mod operands;
mod rng;
mod segments;
mod select;
mod shrink;
mod soft;

use case::{Case, Executor, Patterns};
use select::Family;
use softcpu::SoftSpec;
use std::collections::BTreeMap;

/// Cases run between looks at the results.
const CHUNK: u64 = 256;
/// Failing instructions reported in full.
const REPORTED: usize = 60;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |v| {
        let parsed = match v.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16),
            None => v.parse(),
        };
        parsed.unwrap_or_else(|_| panic!("{name} is a number, not '{v}'"))
    })
}

/// Runs a family with its share (in thousandths) of the cases.
fn run(family: Family, share: u64) {
    let seed = setting("KVASIR_DIFF_SEED", 0x6b76_6173_6972);
    let count = (setting("KVASIR_DIFF_CASES", 1_000_000) * share / 1000).max(1);
    let mut codes = select::codes(family);
    if let Ok(only) = std::env::var("KVASIR_DIFF_ONLY") {
        codes.retain(|c| format!("{c:?}").contains(&only));
        if codes.is_empty() {
            return;
        }
    }
    assert!(!codes.is_empty(), "no instructions in {family:?}");
    println!("{family:?}: {} instructions, {count} cases, seed {seed:#x}", codes.len());
    let patterns = Patterns::new(&mut rng::Rng::new(seed));
    let mut native = native::Native::new(&patterns);
    let mut others: Vec<Box<dyn Executor + '_>> = Vec::new();
    let which = std::env::var("KVASIR_DIFF_EXECUTORS").unwrap_or_else(|_| "interpreter,translator".into());
    for name in which.split(',') {
        let (name, translate) = match name {
            "interpreter" => ("interpreter", false),
            "translator" => ("translator", true),
            other => panic!("KVASIR_DIFF_EXECUTORS: '{other}' is neither interpreter nor translator"),
        };
        let spec = SoftSpec { translate: Some(translate), cache: 64 << 20, threshold: 0, exact: true };
        others.push(Box::new(soft::Soft::new(name, &patterns, spec)));
    }
    let mut generator =
        generate::Generator::new(seed ^ (family as u64) << 56, family.bits(), &codes, &patterns);
    let mut failures: BTreeMap<String, u64> = BTreeMap::new();
    let mut left = count;
    while left > 0 {
        let n = left.min(CHUNK);
        left -= n;
        let cases: Vec<Case> = (0..n).map(|_| generator.case()).collect();
        let expected = native.run(&cases);
        for other in &mut others {
            let got = other.run(&cases);
            for ((case, expected), got) in cases.iter().zip(&expected).zip(&got) {
                let Some(expected) = expected else { continue };
                let differences = match got {
                    Some(got) => compare::compare(case, expected, got),
                    None => vec!["breakdown".into()],
                };
                if differences.is_empty() {
                    continue;
                }
                let key = format!("{:?}", compare::first_code(case));
                let new = !failures.contains_key(&key);
                *failures.entry(key).or_default() += 1;
                if new && failures.len() <= REPORTED {
                    report(case, &differences, &mut native, &mut **other);
                }
            }
        }
    }
    if !failures.is_empty() {
        let total: u64 = failures.values().sum();
        println!("{family:?}: {total} of {count} cases disagree (seed {seed:#x}); by first instruction:");
        for (code, n) in &failures {
            println!("  {n:>8} {code}");
        }
        panic!("{family:?}: {total} of {count} cases disagree");
    }
}

/// Shrinks and prints a failing case.
fn report(case: &Case, found: &[String], native: &mut dyn Executor, other: &mut dyn Executor) {
    let mut outcomes = |c: &Case| {
        let a = native.run(std::slice::from_ref(c)).remove(0);
        let b = other.run(std::slice::from_ref(c)).remove(0);
        (a, b)
    };
    // What differs, without values; shrinking must not turn one failure into another.
    let mut kind = |c: &Case| match outcomes(c) {
        (Some(a), Some(b)) => {
            compare::compare(c, &a, &b).first().map(|d| d.split(':').next().unwrap_or_default().to_owned())
        }
        (Some(_), None) => Some("breakdown".into()),
        (None, _) => None,
    };
    let wanted = kind(case);
    if wanted.is_none() {
        println!("---- not reproducible alone: {}", found.join("; "));
        print!("{}", compare::describe(case));
        return;
    }
    let small = shrink::shrink(case, |c| kind(c).as_deref().map(head) == wanted.as_deref().map(head));
    let (a, b) = outcomes(&small);
    println!("---- native / {}", other.name());
    print!("{}", compare::describe(&small));
    match (a, b) {
        (Some(a), Some(b)) => {
            for line in compare::compare(&small, &a, &b) {
                println!("  {line}");
            }
        }
        (a, b) => println!("  finished: {} / {}", a.is_some(), b.is_some()),
    }
}

/// A difference's name without the number of the register or the address.
fn head(name: &str) -> &str {
    name.trim_end_matches(|c: char| c.is_ascii_hexdigit() || c == 'x' || c == ']')
}

macro_rules! families {
    ($($name:ident = $family:ident, $share:literal;)*) => {
        $(#[test]
        fn $name() {
            run(Family::$family, $share);
        })*

        #[test]
        fn shares_add_up() {
            assert_eq!(0 $(+ $share)*, 1000);
        }
    };
}

families! {
    integer = Integer, 210;
    flow = Flow, 50;
    strings = Strings, 40;
    x87 = X87, 90;
    mmx = Mmx, 60;
    sse = Sse, 110;
    avx = Avx, 120;
    avx2_fma = Avx2, 100;
    crypto = Crypto, 40;
    state = State, 30;
    compatibility = Compatibility, 90;
    sixteen = Sixteen, 60;
}

/// CPUID bits of the software CPU that promise no instruction, or one that cannot be compared (its result is random, or
/// the machine's own, or it is privileged).
const OTHER_BITS: &[(u32, u32, usize, &[u32])] = &[
    // PCID, x2APIC, TSC deadline, RDRAND, hypervisor.
    (1, 0, 2, &[17, 21, 24, 30, 31]),
    // VME, DE, PSE, TSC, MSR, PAE, MCE, APIC, SEP, MTRR, PGE, MCA, PAT, PSE-36, HTT.
    (1, 0, 3, &[1, 2, 3, 4, 5, 6, 7, 9, 11, 12, 13, 14, 16, 17, 28]),
    // TSC_ADJUST, SMEP, ERMS, INVPCID, selectors deprecated, RDSEED, SMAP.
    (7, 0, 1, &[1, 7, 9, 10, 13, 18, 20]),
    // UMIP, RDPID.
    (7, 0, 2, &[2, 22]),
    (7, 0, 3, &[]),
    (7, 1, 0, &[]),
    // XGETBV with ECX = 1, XSAVES.
    (0xd, 1, 0, &[2, 3]),
    // LAHF in 64-bit mode, topology extensions.
    (0x8000_0001, 0, 2, &[0, 22]),
];

#[test]
fn every_promise_is_tested() {
    let table = softcpu::cpuid::supported();
    for (leaf, sub, register, other) in OTHER_BITS {
        let tested = select::PROMISES
            .iter()
            .filter(|p| (p.0, p.1, p.2) == (*leaf, *sub, *register))
            .fold(0, |w, p| w | 1u32 << p.3);
        let promised = table.query(*leaf, *sub)[*register];
        let other = other.iter().fold(0, |w, bit| w | 1u32 << bit);
        assert_eq!(
            promised & !(tested | other),
            0,
            "leaf {leaf:#x}.{sub} register {register} promises untested bits"
        );
    }
}

#[test]
fn every_instruction_can_be_generated() {
    use Family::*;
    let patterns = Patterns::new(&mut rng::Rng::new(1));
    let mut missing = Vec::new();
    for family in [Integer, Flow, Strings, X87, Mmx, Sse, Avx, Avx2, Crypto, State, Compatibility, Sixteen] {
        for code in select::codes(family) {
            let one = [code];
            let mut generator = generate::Generator::new(7, family.bits(), &one, &patterns);
            if !(0..200).any(|_| generator.attempt().is_some()) {
                missing.push(code);
            }
        }
    }
    assert!(missing.is_empty(), "cannot generate {missing:?}");
}
