//! Expressions that people type: numbers, registers, arithmetic.

use crate::qmp::{Error, Result};
use accel::CpuState;

/// Deepest nesting of parentheses.
const DEEPEST: usize = 64;

/// Reads an expression from the front of `text`; returns its value and what follows.
pub(super) fn parse<'t>(text: &'t str, cpu: Option<&CpuState>) -> Result<(u64, &'t str)> {
    let mut p = Parser { rest: text.trim_start(), cpu, depth: 0 };
    let value = p.logic()?;
    Ok((value, p.rest.trim_start()))
}

/// Reads a whole text as one expression.
pub(super) fn whole(text: &str, cpu: Option<&CpuState>) -> Result<u64> {
    match parse(text, cpu)? {
        (value, "") => Ok(value),
        (_, rest) => Err(Error::generic(format!("unexpected '{rest}' after the expression"))),
    }
}

struct Parser<'t, 'c> {
    rest: &'t str,
    cpu: Option<&'c CpuState>,
    depth: usize,
}

impl Parser<'_, '_> {
    fn peek(&mut self) -> Option<char> {
        self.rest = self.rest.trim_start();
        self.rest.chars().next()
    }

    fn take(&mut self, wanted: char) -> bool {
        let found = self.peek() == Some(wanted);
        if found {
            self.rest = &self.rest[wanted.len_utf8()..];
        }
        found
    }

    fn logic(&mut self) -> Result<u64> {
        let mut v = self.product()?;
        loop {
            // As QEMU's: + and - bind like & | ^ do.
            if self.take('+') {
                v = v.wrapping_add(self.product()?);
            } else if self.take('-') {
                v = v.wrapping_sub(self.product()?);
            } else if self.take('&') {
                v &= self.product()?;
            } else if self.take('|') {
                v |= self.product()?;
            } else if self.take('^') {
                v ^= self.product()?;
            } else {
                return Ok(v);
            }
        }
    }

    fn product(&mut self) -> Result<u64> {
        let mut v = self.unary()?;
        loop {
            if self.take('*') {
                v = v.wrapping_mul(self.unary()?);
                continue;
            }
            let divide = self.take('/');
            if !divide && !self.take('%') {
                return Ok(v);
            }
            let by = self.unary()?;
            if by == 0 {
                return Err(Error::generic("division by zero"));
            }
            v = if divide { v / by } else { v % by };
        }
    }

    fn unary(&mut self) -> Result<u64> {
        self.depth += 1;
        if self.depth > DEEPEST {
            return Err(Error::generic("the expression is nested too deeply"));
        }
        let v = match self.peek() {
            Some('+') => {
                self.take('+');
                self.unary()?
            }
            Some('-') => {
                self.take('-');
                self.unary()?.wrapping_neg()
            }
            Some('~') => {
                self.take('~');
                !self.unary()?
            }
            Some('(') => {
                self.take('(');
                let v = self.logic()?;
                if !self.take(')') {
                    return Err(Error::generic("')' expected"));
                }
                v
            }
            Some('$') => {
                self.take('$');
                self.register()?
            }
            Some(c) if c.is_ascii_digit() => self.number()?,
            Some(c) => return Err(Error::generic(format!("unexpected '{c}' in an expression"))),
            None => return Err(Error::generic("unexpected end of expression")),
        };
        self.depth -= 1;
        Ok(v)
    }

    fn word(&mut self) -> &str {
        let end = self.rest.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        word
    }

    fn number(&mut self) -> Result<u64> {
        let word = self.word();
        let parsed = if let Some(hex) = word.strip_prefix("0x").or_else(|| word.strip_prefix("0X")) {
            u64::from_str_radix(hex, 16)
        } else if word.len() > 1 && word.starts_with('0') {
            u64::from_str_radix(word, 8)
        } else {
            word.parse()
        };
        parsed.map_err(|_| Error::generic(format!("'{word}' is no number")))
    }

    fn register(&mut self) -> Result<u64> {
        let cpu = self.cpu;
        let word = self.word().to_ascii_lowercase();
        let cpu = cpu.ok_or_else(|| Error::generic("no CPU"))?;
        super::registers::value(cpu, &word)
            .ok_or_else(|| Error::generic(format!("unknown register '{word}'")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values() {
        let cpu = CpuState { rip: 0x1000, gpr: std::array::from_fn(|i| i as u64), ..CpuState::default() };
        let v = |t: &str| whole(t, Some(&cpu)).unwrap();
        assert_eq!(v("1+2*0x10"), 33);
        assert_eq!(v("(1 + 2) * 010"), 24);
        assert_eq!(v("$rip + 4"), 0x1004);
        assert_eq!(v("$eax|$r9"), 9);
        assert_eq!(v("~0 & 0xff"), 0xff);
        assert_eq!(v("-1"), u64::MAX);
        for bad in ["", "1/0", "1 2", "(1", "$foo", "0xg", &"(".repeat(10_000), &"-".repeat(10_000)] {
            assert!(whole(bad, Some(&cpu)).is_err(), "{bad:.20}");
        }
    }
}
