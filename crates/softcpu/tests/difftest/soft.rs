//! The software CPU, through the accelerator's own interface: a guest in long mode with the case's pages mapped at the
//! same addresses, and a kernel of one instruction per exception that tells which one it was.

use crate::case::*;
use crate::common::{Bare, NONE};
use crate::segments;
use accel::state::{MpState, Segment, Table, gpr, seg};
use accel::{CpuState, Exit};
use memory::GuestMemory;

/// Guest RAM.
const RAM: u64 = 1 << 20;
/// Where things are in guest RAM.
const PML4: u64 = 0x1000;
const PDPT_LOW: u64 = 0x2000;
const PDPT_HIGH: u64 = 0x3000;
const PD_LOW: u64 = 0x4000;
const PD_HIGH: u64 = 0x5000;
const PT_CODE: u64 = 0x6000;
const PT_DATA: u64 = 0x7000;
const GDT: u64 = 0x8000;
const IDT: u64 = 0x9000;
const TSS: u64 = 0xa000;
const LDT: u64 = 0xf000;
const HANDLERS: u64 = 0xb000;
const STACK_TOP: u64 = 0xe000;
const CODE_PAGE: u64 = 0x2_0000;
const DATA_PAGES: u64 = 0x3_0000;
/// Guest RAM as the kernel sees it.
const KERNEL: u64 = 0xffff_8000_0000_0000;
const KERNEL_CS: u16 = 0x08;

/// The executor.
pub struct Soft<'a> {
    name: &'static str,
    patterns: &'a Patterns,
    bare: Bare,
    template: CpuState,
    /// Where the code page was last written.
    written: (usize, usize),
}

fn page_tables(m: &GuestMemory) {
    let put = |at: u64, value: u64| m.write_obj(at, &value).unwrap();
    const USER: u64 = 7;
    const KERNEL_RW: u64 = 3;
    put(PML4, PDPT_LOW | USER);
    put(PML4 + 256 * 8, PDPT_HIGH | KERNEL_RW);
    put(PDPT_LOW, PD_LOW | USER);
    put(PDPT_HIGH, PD_HIGH | KERNEL_RW);
    put(PD_LOW + (CODE >> 21) * 8, PT_CODE | USER);
    put(PD_LOW + (DATA >> 21) * 8, PT_DATA | USER);
    put(PD_HIGH, 0x80 | KERNEL_RW); // 2 MiB page at 0
    put(PT_CODE, CODE_PAGE | 5);
    const NX: u64 = 1 << 63;
    for page in 0..DATA_LEN as u64 / 4096 {
        put(PT_DATA + page * 8, (DATA_PAGES + page * 4096) | USER | NX);
    }
    put(PT_DATA + (DATA_LEN as u64 / 4096) * 8, (DATA_PAGES + DATA_LEN as u64) | 5 | NX);
}

fn descriptor_tables(m: &GuestMemory) {
    let put = |at: u64, value: u64| m.write_obj(at, &value).unwrap();
    put(GDT + 0x08, 0x00af_9b00_0000_ffff); // kernel code
    put(GDT + 0x10, 0x00cf_9300_0000_ffff); // kernel data
    put(GDT + u64::from(USER_SS & !7), 0x00cf_f300_0000_ffff);
    put(GDT + u64::from(USER_CS & !7), 0x00af_fb00_0000_ffff);
    put(GDT + u64::from(USER32_CS & !7), 0x00cf_fb00_0000_ffff);
    for (n, descriptor) in segments::LDT.iter().enumerate() {
        put(LDT + n as u64 * 8, descriptor.bits());
    }
    for v in 0..32 {
        let at = KERNEL + HANDLERS + v * 16;
        // OUT imm8, AL; JMP to itself.
        m.write(HANDLERS + v * 16, &[0xe6, v as u8, 0xeb, 0xfe]).unwrap();
        let dpl = if v == 3 || v == 4 { 3 << 5 } else { 0 };
        let low = (at & 0xffff) | u64::from(KERNEL_CS) << 16 | (0x8e | dpl) << 40 | (at >> 16 & 0xffff) << 48;
        put(IDT + v * 16, low);
        put(IDT + v * 16 + 8, at >> 32);
    }
    m.write_obj(TSS + 4, &(KERNEL + STACK_TOP)).unwrap();
    m.write_obj(TSS + 102, &0x68u16).unwrap();
}

fn flat(selector: u16, attributes: u32) -> Segment {
    Segment { selector, base: 0, limit: u32::MAX, attributes }
}

/// A segment register at the start of a case.
fn loaded(selector: u16) -> Segment {
    if selector == USER_SS {
        return flat(selector, 0xc0f3);
    }
    segments::LDT[usize::from(selector / 8)].segment(selector)
}

fn template() -> CpuState {
    let null = Segment { attributes: Segment::UNUSABLE, ..Default::default() };
    let mut s = CpuState {
        cr0: 0x8005_0033, // PG, AM, WP, NE, ET, MP, PE
        cr3: PML4,
        cr4: 1 << 5 | 1 << 9 | 1 << 10 | 1 << 16 | 1 << 18, // PAE, OSFXSR, OSXMMEXCPT, FSGSBASE, OSXSAVE
        efer: 1 | 1 << 8 | 1 << 10 | 1 << 11,
        apic_base: 0xfee0_0900,
        xcr0: 7,
        dr: [0, 0, 0, 0, 0xffff_0ff0, 0x400],
        mp_state: MpState::Runnable,
        ..Default::default()
    };
    s.segments = [null; 6];
    s.segments[seg::GS].base = GS_BASE;
    s.gdtr = Table { base: KERNEL + GDT, limit: 0x3f };
    s.idtr = Table { base: KERNEL + IDT, limit: 0x1ff };
    s.tr = Segment { selector: 0, base: KERNEL + TSS, limit: 0x67, attributes: 0x8b };
    let limit = segments::LDT.len() as u32 * 8 - 1;
    s.ldtr = Segment { selector: 0x40, base: KERNEL + LDT, limit, attributes: 0x82 };
    s.xsave = vec![0; 832];
    s
}

impl<'a> Soft<'a> {
    /// A fresh VM.
    pub fn new(name: &'static str, patterns: &'a Patterns, spec: softcpu::SoftSpec) -> Self {
        let bare = Bare::new(RAM, spec);
        let memory = &bare.memory;
        page_tables(memory);
        descriptor_tables(memory);
        memory.fill(CODE_PAGE, 4096, 0xcc).unwrap();
        memory.write(DATA_PAGES + DATA_LEN as u64, &patterns.get(1)[..READ_ONLY_LEN]).unwrap();
        Self { name, patterns, bare, template: template(), written: (0, 0) }
    }

    fn prepare(&mut self, case: &Case) {
        let m = &self.bare.memory;
        let (at, len) = self.written;
        m.fill(CODE_PAGE + at as u64, len as u64, 0xcc).unwrap();
        m.write(CODE_PAGE + u64::from(case.entry), case.bytes()).unwrap();
        self.written = (case.entry as usize, case.code_len as usize);
        let mut data = *self.patterns.get(case.pattern);
        case.apply_patch(&mut data);
        m.write(DATA_PAGES, &data).unwrap();
        let s = &mut self.template;
        let r = &case.regs;
        s.gpr = r.gpr;
        s.rip = r.rip;
        s.segments[seg::CS] = match case.bits {
            64 => flat(USER_CS, 0xa0fb),
            32 => flat(USER32_CS, 0xc0fb),
            _ => loaded(case.cs()),
        };
        for (n, selector) in [seg::ES, seg::SS, seg::DS].iter().zip(r.segments) {
            s.segments[*n] = loaded(selector);
        }
        s.rflags = r.rflags;
        pack(r, &mut s.xsave);
    }

    fn collect(&mut self, case: &Case, out: &mut Outcome) -> Result<(), String> {
        let s = self.bare.vcpu.save().map_err(|e| e.to_string())?;
        out.vector = self.bare.ports.last();
        let errors = has_error(out.vector);
        // The frame that the exception pushed: error code, RIP, CS, RFLAGS, RSP, SS.
        let frame = STACK_TOP - if errors { 48 } else { 40 };
        if s.gpr[gpr::RSP] != KERNEL + frame {
            return Err(format!("kernel stack pointer is {:#x}", s.gpr[gpr::RSP]));
        }
        let word = |n: u64| self.bare.memory.read_obj::<u64>(frame + n * 8).unwrap();
        let first = u64::from(errors);
        out.error = if errors { word(0) as u32 } else { 0 };
        if word(first + 1) as u16 != case.cs() {
            return Err(format!("CS in the frame is {:#x}", word(first + 1)));
        }
        let r = &mut out.regs;
        r.gpr = s.gpr;
        (r.rip, r.rflags, r.gpr[gpr::RSP]) = (word(first), word(first + 2), word(first + 3));
        r.segments = [s.segments[seg::ES].selector, word(first + 4) as u16, s.segments[seg::DS].selector];
        out.cr2 = if out.vector == 14 { s.cr2 } else { 0 };
        unpack(&s.xsave, r);
        self.bare.memory.read(DATA_PAGES, &mut out.data).unwrap();
        Ok(())
    }

    fn run_one(&mut self, case: &Case) -> Result<Box<Outcome>, String> {
        self.prepare(case);
        self.bare.vcpu.load(&self.template).map_err(|e| e.to_string())?;
        self.bare.ports.clear();
        let exit = self.bare.vcpu.run(&self.bare.ports).map_err(|e| e.to_string())?;
        if exit != Exit::Kicked || self.bare.ports.last() == NONE {
            return Err(format!("left with {exit:?}"));
        }
        let mut out =
            Box::new(Outcome { regs: Regs::plain(), vector: 0, error: 0, cr2: 0, data: [0; DATA_LEN] });
        self.collect(case, &mut out)?;
        Ok(out)
    }
}

impl Executor for Soft<'_> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn run(&mut self, cases: &[Case]) -> Vec<Option<Box<Outcome>>> {
        let mut all = Vec::with_capacity(cases.len());
        for case in cases {
            let outcome = self.run_one(case);
            if let Err(e) = &outcome {
                eprintln!("{}: broke down on {:02x?}: {e}", self.name, case.bytes());
            }
            all.push(outcome.ok());
        }
        all
    }
}

/// Standard-format XSAVE area.
pub fn pack(r: &Regs, out: &mut [u8]) {
    let mut put = |at: usize, b: &[u8]| out[at..at + b.len()].copy_from_slice(b);
    put(0, &r.fcw.to_le_bytes());
    put(2, &r.fsw.to_le_bytes());
    put(4, &r.ftw.to_le_bytes());
    put(6, &r.fop.to_le_bytes());
    put(8, &r.fip.to_le_bytes());
    put(16, &r.fdp.to_le_bytes());
    put(24, &r.mxcsr.to_le_bytes());
    for i in 0..8 {
        put(32 + 16 * i, &r.st[i]);
    }
    for i in 0..16 {
        put(160 + 16 * i, &r.vec[i][..16]);
        if i * 16 + 592 <= 832 {
            put(576 + 16 * i, &r.vec[i][16..]);
        }
    }
    put(512, &7u64.to_le_bytes());
}

fn unpack(from: &[u8], r: &mut Regs) {
    let get = |at: usize, n: usize| {
        let mut b = [0; 8];
        b[..n].copy_from_slice(&from[at..at + n]);
        u64::from_le_bytes(b)
    };
    (r.fcw, r.fsw, r.ftw, r.fop) = (get(0, 2) as u16, get(2, 2) as u16, get(4, 1) as u16, get(6, 2) as u16);
    (r.fip, r.fdp, r.mxcsr) = (get(8, 8), get(16, 8), get(24, 4) as u32);
    for (i, st) in r.st.iter_mut().enumerate() {
        st.copy_from_slice(&from[32 + 16 * i..42 + 16 * i]);
    }
    for (i, v) in r.vec.iter_mut().enumerate() {
        v[..16].copy_from_slice(&from[160 + 16 * i..176 + 16 * i]);
        v[16..].copy_from_slice(&from[576 + 16 * i..592 + 16 * i]);
    }
}
