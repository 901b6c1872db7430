//! One TCP connection: the guest's end is here, the other is a socket of the host's kernel.

use super::super::ring::Ring;
use crate::MacAddr;
use crate::wire::tcp::before;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// Largest window that the guest is given, in bytes, if it scales windows; then the shift.
pub(super) const WINDOW: u32 = 65535 << SCALE;
pub(super) const SCALE: u8 = 4;
/// Window while memory is short.
const SMALL_WINDOW: u32 = 32 << 10;
/// First retransmission; each further one waits twice as long.
pub(super) const FIRST_TIMEOUT: Duration = Duration::from_millis(500);
const LONGEST_TIMEOUT: Duration = Duration::from_secs(60);
/// Retransmissions before the guest is given up.
const TRIES: u32 = 12;
/// The same while connecting.
const CONNECT_TRIES: u32 = 5;

/// Both ends as the guest sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) guest: IpAddr,
    pub(super) guest_port: u16,
    pub(super) peer: IpAddr,
    pub(super) peer_port: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// The guest wants to connect; the host's socket is at it.
    Connecting,
    /// The host's socket is connected; the guest is told.
    SynReceived,
    /// A forwarded connection; the guest is asked.
    SynSent,
    /// Data flows.
    Open,
}

#[derive(Debug)]
pub(super) struct Flow {
    pub(super) key: Key,
    pub(super) mac: Option<MacAddr>,
    pub(super) socket: OwnedFd,
    pub(super) state: State,

    /// Next byte expected from the guest; all before it are the kernel's, or in the spill.
    pub(super) rcv_nxt: u32,
    /// End of the window that the guest was told.
    pub(super) rcv_edge: u32,
    /// Bytes that the kernel would not take, and how many of them it has taken since.
    pub(super) spill: Vec<u8>,
    pub(super) spill_done: usize,
    /// The guest will send no more; and the kernel knows.
    pub(super) guest_fin: bool,
    pub(super) shut: bool,
    /// The guest is to be told where we are.
    pub(super) ack_due: bool,

    /// Oldest byte that the guest has not acknowledged; it is the ring's first.
    pub(super) snd_una: u32,
    /// Next to send; and next never sent.
    pub(super) snd_nxt: u32,
    pub(super) snd_max: u32,
    /// The guest's window in bytes, and how it scales what it says.
    pub(super) snd_wnd: u32,
    pub(super) snd_scale: Option<u8>,
    pub(super) mss: u16,
    pub(super) ring: Ring,
    /// The socket will give no more.
    pub(super) eof: bool,
    /// Sequence number of our FIN, once it was sent; and whether the guest has it.
    pub(super) fin: Option<u32>,
    pub(super) fin_acked: bool,
    pub(super) duplicates: u8,
    pub(super) recover: u32,

    /// What epoll said last.
    pub(super) readable: bool,
    pub(super) writable: bool,
    pub(super) hangup: bool,

    /// In the list of flows with something to do.
    pub(super) queued: bool,
    pub(super) timer: Option<Instant>,
    pub(super) timer_queued: bool,
    pub(super) tries: u32,
    pub(super) used: Instant,
    /// A window of zero may be tried by one byte.
    pub(super) probe: bool,
}

impl Flow {
    pub(super) fn new(
        key: Key,
        mac: Option<MacAddr>,
        socket: OwnedFd,
        state: State,
        isn: u32,
        now: Instant,
    ) -> Self {
        Self {
            key,
            mac,
            socket,
            state,
            rcv_nxt: 0,
            rcv_edge: 0,
            spill: Vec::new(),
            spill_done: 0,
            guest_fin: false,
            shut: false,
            ack_due: false,
            snd_una: isn,
            snd_nxt: isn,
            snd_max: isn,
            snd_wnd: 0,
            snd_scale: None,
            mss: 536,
            ring: Ring::default(),
            eof: false,
            fin: None,
            fin_acked: false,
            duplicates: 0,
            recover: isn,
            readable: false,
            writable: false,
            hangup: false,
            queued: false,
            timer: None,
            timer_queued: false,
            tries: 0,
            used: now,
            probe: false,
        }
    }

    /// Whether the SYN (ours) has been acknowledged, so that the ring starts at `snd_una`.
    pub(super) fn is_open(&self) -> bool {
        self.state == State::Open
    }

    pub(super) fn spilled(&self) -> usize {
        self.spill.len() - self.spill_done
    }

    pub(super) fn memory(&self) -> usize {
        self.spill.capacity() + self.ring.memory()
    }

    /// Sequence number after the last byte that the ring holds.
    pub(super) fn data_end(&self) -> u32 {
        self.snd_una.wrapping_add(self.ring.len() as u32) // at most 1 MiB
    }

    /// Bytes of the ring that were sent before `snd_nxt`, and those that were not.
    pub(super) fn split(&self) -> (usize, usize) {
        let sent = (self.snd_nxt.wrapping_sub(self.snd_una) as usize).min(self.ring.len());
        (sent, self.ring.len() - sent)
    }

    /// Room that the guest has for more.
    pub(super) fn room(&self) -> u32 {
        let edge = self.snd_una.wrapping_add(self.snd_wnd);
        if before(self.snd_nxt, edge) { edge.wrapping_sub(self.snd_nxt) } else { 0 }
    }

    /// Extends the window that the guest has; returns what to tell it. It is never taken back. While the kernel takes
    /// no more it stays where it is, so the spill is bounded by it.
    pub(super) fn window(&mut self, short: bool) -> u16 {
        let scale = if self.snd_scale.is_some() { SCALE } else { 0 };
        if self.spilled() == 0 {
            let most = if short { SMALL_WINDOW } else { WINDOW }.min(65535 << scale);
            let edge = self.rcv_nxt.wrapping_add(most);
            if before(self.rcv_edge, edge) {
                self.rcv_edge = edge;
            }
        }
        (self.rcv_edge.wrapping_sub(self.rcv_nxt) >> scale).min(65535) as u16
    }

    /// Whether the guest has used up so much of its window that it should hear of more.
    pub(super) fn wants_update(&self) -> bool {
        self.spilled() == 0 && self.rcv_edge.wrapping_sub(self.rcv_nxt) < SMALL_WINDOW / 2
    }

    /// How long to wait for the guest this time; `None` if it is given up.
    pub(super) fn timeout(&self) -> Option<Duration> {
        let most = if self.is_open() { TRIES } else { CONNECT_TRIES };
        (self.tries <= most).then(|| (FIRST_TIMEOUT * (1 << self.tries.min(10))).min(LONGEST_TIMEOUT))
    }

    /// Whether both directions have ended and nothing is left to say.
    pub(super) fn is_done(&self) -> bool {
        self.guest_fin && self.shut && self.fin_acked && !self.ack_due
    }
}
