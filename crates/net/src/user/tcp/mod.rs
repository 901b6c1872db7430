//! TCP: the guest's connections end here and go on as sockets of the host.
//!
//! The guest's bytes go from its memory into the kernel's socket in one system call for each (large) segment; they are
//! acknowledged when the kernel has them. What it refuses is kept, bounded by the window that the guest was given, which
//! does not move until the kernel takes more: so the far end's pace becomes the guest's. Bytes from the far end are read
//! into a ring, from which they go to the guest in segments as large as it takes, and stay there until it has
//! acknowledged them.
//!
//! Nothing is lost on this cable, so there is no congestion control; what a guest drops for lack of memory is sent
//! again, all from the first missing byte.

mod flow;

use super::lan::{LINK, Lan};
use super::slab::Slab;
use super::{Events, Shared};
use crate::wire::icmp::Unreachable;
use crate::wire::tcp::{Tcp as Header, before, flag};
use crate::wire::{Sum, ip, protocol, pseudo_header};
use crate::{Frame, MacAddr, Offloads, Receiver, VnetHeader, sys};
use flow::{Flow, Key, SCALE, State};
use rustix::event::epoll::EventFlags;
use rustix::net::{Shutdown, SocketType, shutdown};
use std::cmp::Reverse;
use std::collections::hash_map::{Entry, RandomState};
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::hash::BuildHasher;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

/// Memory for bytes under way, of all connections together, above which windows and rings stay small.
const BUDGET: usize = 256 << 20;
/// Bytes read from one connection before the next has its turn.
const TURN: usize = 256 << 10;
/// Largest IP packet.
const LARGEST: usize = 65535;

/// A packet of the guest's.
pub(super) struct Packet<'a> {
    pub(super) ip: ip::Ip,
    pub(super) mac: MacAddr,
    /// The start of the IP packet, as far as it was copied out.
    pub(super) head: &'a [u8],
    /// All of it: frame, and where its IP payload starts.
    pub(super) frame: &'a Frame<'a>,
    pub(super) payload: usize,
}

/// Result of giving a connection its turn.
enum Turn {
    /// There is nothing to do until something happens.
    Idle,
    /// There is more.
    Again,
    /// The guest has no room.
    Full,
    /// The connection has ended.
    Over,
}

pub(super) struct Tcp {
    flows: Slab<Flow>,
    index: HashMap<Key, u32>,
    /// The connection of the last packet: the next is mostly of the same.
    last: Option<(Key, u32)>,
    ready: VecDeque<u32>,
    timers: BinaryHeap<Reverse<(Instant, u32)>>,
    most: usize,
    memory: usize,
    secret: RandomState,
    started: Instant,
    scratch: sys::Scratch,
}

impl Tcp {
    pub(super) fn new(most: usize) -> Self {
        Self {
            flows: Slab::new(),
            index: HashMap::new(),
            last: None,
            ready: VecDeque::new(),
            timers: BinaryHeap::new(),
            most,
            memory: 0,
            secret: RandomState::new(),
            started: Instant::now(),
            scratch: sys::Scratch::default(),
        }
    }

    pub(super) fn connections(&self) -> usize {
        self.flows.len()
    }

    /// When something is due.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.timers.peek().map(|Reverse((at, _))| *at)
    }

    /// Whether some connection could go on now, if the guest has room.
    pub(super) fn is_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Initial sequence numbers: a clock beside a keyed hash (RFC 6528).
    fn isn(&self, key: &Key) -> u32 {
        let clock = (self.started.elapsed().as_micros() / 4) as u32;
        (self.secret.hash_one(key) as u32).wrapping_add(clock)
    }

    fn find(&mut self, key: &Key) -> Option<u32> {
        if let Some((last, id)) = &self.last
            && last == key
        {
            return Some(*id);
        }
        let id = *self.index.get(key)?;
        self.last = Some((*key, id));
        Some(id)
    }

    fn queue(&mut self, id: u32) {
        if let Some(flow) = self.flows.get_mut(id)
            && !flow.queued
        {
            flow.queued = true;
            self.ready.push_back(id);
        }
    }

    /// Sets a connection's timer; the heap has one entry for each at most, which may be early.
    fn arm(&mut self, id: u32, at: Option<Instant>) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        flow.timer = at;
        if let Some(at) = at
            && !flow.timer_queued
        {
            flow.timer_queued = true;
            self.timers.push(Reverse((at, id)));
        }
    }

    fn remove(&mut self, id: u32, reset: bool) {
        if let Some(flow) = self.flows.remove(id) {
            self.index.remove(&flow.key);
            self.memory = self.memory.saturating_sub(flow.memory());
            if reset {
                sys::reset_on_close(flow.socket.as_fd());
            }
        }
        self.last = None;
    }

    /// Ends a connection by reset, both ways.
    fn abort(&mut self, id: u32, lan: &mut Lan) {
        if let Some(flow) = self.flows.get(id)
            && let Some(mac) = flow.mac
            && flow.state != State::Connecting
        {
            let header = Header {
                src: flow.key.peer_port,
                dst: flow.key.guest_port,
                seq: flow.snd_nxt,
                ack: flow.rcv_nxt,
                flags: flag::RST | flag::ACK,
                window: 0,
                header: 0,
                mss: None,
                scale: None,
            };
            queue_segment(lan, mac, &flow.key, &header);
        }
        self.remove(id, true);
    }

    /// A segment from the guest.
    pub(super) fn input(&mut self, packet: &Packet<'_>, shared: &mut Shared<'_>) {
        let Some(tcp) = packet.head.get(packet.ip.payload..).and_then(Header::parse) else { return };
        let Some(len) = packet.ip.len.checked_sub(tcp.header) else { return };
        let key = Key { guest: packet.ip.src, guest_port: tcp.src, peer: packet.ip.dst, peer_port: tcp.dst };
        let Some(id) = self.find(&key) else {
            if tcp.flags & (flag::SYN | flag::ACK | flag::RST | flag::FIN) == flag::SYN {
                self.open(packet, &tcp, key, shared);
            } else if tcp.flags & flag::RST == 0 {
                refuse(shared.lan, packet.mac, &key, &tcp, len);
            }
            return;
        };
        let Some(flow) = self.flows.get_mut(id) else { return };
        flow.used = shared.now;
        let (memory, una) = (flow.memory(), flow.snd_una);
        let over = Self::segment(flow, &mut self.scratch, packet, &tcp, len);
        self.memory = (self.memory + flow.memory()).saturating_sub(memory);
        let progress = flow.snd_una != una;
        let due = (flow.snd_una != flow.snd_max).then(|| flow.timeout()).flatten().map(|t| shared.now + t);
        match over {
            Ok(work) => {
                if progress {
                    self.arm(id, due);
                }
                if work {
                    self.queue(id);
                }
            }
            Err(Ended::ByGuest) => self.remove(id, true),
            Err(Ended::ByHost) => self.abort(id, shared.lan),
        }
    }

    /// What a segment means to its connection. Returns whether there is something to do now.
    fn segment(
        flow: &mut Flow,
        scratch: &mut sys::Scratch,
        packet: &Packet<'_>,
        tcp: &Header,
        len: usize,
    ) -> Result<bool, Ended> {
        if tcp.flags & flag::RST != 0 {
            let expected = match flow.state {
                State::Connecting => true,
                State::SynSent => tcp.flags & flag::ACK != 0 && tcp.ack == flow.snd_nxt,
                // Anywhere in the window; nobody else is on this cable.
                _ => tcp.seq.wrapping_sub(flow.rcv_nxt) <= flow.rcv_edge.wrapping_sub(flow.rcv_nxt),
            };
            return if expected { Err(Ended::ByGuest) } else { Ok(false) };
        }
        match flow.state {
            State::Connecting => return Ok(false), // it asks again; so do we
            State::SynSent => {
                let both = flag::SYN | flag::ACK;
                if tcp.flags & both != both || tcp.ack != flow.snd_nxt {
                    return Ok(false);
                }
                flow.rcv_nxt = tcp.seq.wrapping_add(1);
                flow.rcv_edge = flow.rcv_nxt;
                learn_options(flow, tcp);
                flow.snd_una = tcp.ack;
                flow.snd_wnd = tcp.window.into();
                flow.state = State::Open;
                flow.tries = 0;
                flow.ack_due = true;
                return Ok(true);
            }
            State::SynReceived => {
                if tcp.flags & flag::SYN != 0 {
                    flow.ack_due = true; // say it again
                    return Ok(true);
                }
                if tcp.flags & flag::ACK == 0 || tcp.ack != flow.snd_nxt {
                    return Ok(false);
                }
                flow.snd_una = tcp.ack;
                flow.state = State::Open;
                flow.tries = 0;
            }
            State::Open => {}
        }
        if tcp.flags & flag::SYN != 0 || tcp.flags & flag::ACK == 0 {
            // A guest that has forgotten the connection resets it when it sees our answer (RFC 5961, 4).
            flow.ack_due = true;
            return Ok(true);
        }
        Self::acknowledged(flow, tcp, len);
        if len > 0 || tcp.flags & flag::FIN != 0 {
            flow.ack_due = true;
            Self::data(flow, scratch, packet, tcp, len)?;
        }
        Ok(true)
    }

    /// What the guest says it has, and has room for.
    fn acknowledged(flow: &mut Flow, tcp: &Header, len: usize) {
        let window = u32::from(tcp.window) << flow.snd_scale.unwrap_or(0);
        let news = tcp.ack.wrapping_sub(flow.snd_una);
        if news > flow.snd_max.wrapping_sub(flow.snd_una) {
            return; // of old, or of what was never sent
        }
        if news == 0 {
            let out = flow.snd_max != flow.snd_una;
            if out && len == 0 && window == flow.snd_wnd && tcp.flags & flag::FIN == 0 {
                flow.duplicates = flow.duplicates.saturating_add(1);
                // Three say that something is missing (RFC 5681, 3.2); once for what is out now.
                if flow.duplicates == 3 && !before(flow.snd_una, flow.recover) {
                    flow.recover = flow.snd_max;
                    flow.snd_nxt = flow.snd_una;
                }
            }
            flow.snd_wnd = window;
            if window == 0 {
                flow.tries = 0; // it is there, and has no room
            }
            return;
        }
        flow.snd_wnd = window;
        flow.duplicates = 0;
        flow.tries = 0;
        flow.probe = false;
        flow.ring.consume(news as usize);
        flow.snd_una = tcp.ack;
        if before(flow.snd_nxt, flow.snd_una) {
            flow.snd_nxt = flow.snd_una;
        }
        if flow.fin.is_some_and(|fin| tcp.ack == fin.wrapping_add(1)) {
            flow.fin_acked = true;
        }
    }

    /// Takes what is new in a segment.
    fn data(
        flow: &mut Flow,
        scratch: &mut sys::Scratch,
        packet: &Packet<'_>,
        tcp: &Header,
        len: usize,
    ) -> Result<(), Ended> {
        if before(flow.rcv_nxt, tcp.seq) || flow.guest_fin {
            return Ok(()); // something before it is missing
        }
        let old = flow.rcv_nxt.wrapping_sub(tcp.seq) as usize;
        if old > len {
            return Ok(());
        }
        let room = flow.rcv_edge.wrapping_sub(flow.rcv_nxt) as usize;
        let fresh = (len - old).min(room);
        if fresh > 0 {
            let at = packet.payload + tcp.header + old;
            let mut taken = 0;
            if flow.spilled() == 0 && !flow.shut {
                match scratch.send(flow.socket.as_fd(), packet.frame, at, fresh, None) {
                    Ok(n) => taken = n,
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                    Err(_) => return Err(Ended::ByHost),
                }
                if taken < fresh {
                    flow.writable = false;
                }
            }
            packet.frame.append_to(at + taken, fresh - taken, &mut flow.spill);
            flow.rcv_nxt = flow.rcv_nxt.wrapping_add(fresh as u32);
        }
        if tcp.flags & flag::FIN != 0 && fresh == len - old {
            flow.rcv_nxt = flow.rcv_nxt.wrapping_add(1);
            flow.rcv_edge = flow.rcv_edge.wrapping_add(1);
            flow.guest_fin = true;
            if flow.spilled() == 0 {
                Self::shut(flow);
            }
        }
        Ok(())
    }

    fn shut(flow: &mut Flow) {
        // A socket that is gone tells so when it is read.
        let _ = shutdown(&flow.socket, Shutdown::Write);
        flow.shut = true;
    }

    /// Opens a connection that the guest asks for.
    fn open(&mut self, packet: &Packet<'_>, tcp: &Header, key: Key, shared: &mut Shared<'_>) {
        let refuse = |shared: &mut Shared<'_>| refuse(shared.lan, packet.mac, &key, tcp, 0);
        if self.flows.len() >= self.most {
            shared.limit("TCP connections");
            return refuse(shared);
        }
        if key.guest_port == 0 || packet.ip.src.is_multicast() || packet.ip.src.is_unspecified() {
            return;
        }
        let attempt = match shared.forwards.connect(key.peer, key.peer_port) {
            Some(result) => result.map(|socket| (socket, true)),
            None => match shared.target(key.peer, key.peer_port) {
                Some(to) => connect(to),
                None if shared.config.spec.restrict => return,
                None => return refuse(shared),
            },
        };
        let (socket, done) = match attempt {
            Ok(s) => s,
            Err(e) => return fail(shared, packet.mac, &key, tcp.seq, &e),
        };
        let isn = self.isn(&key);
        let mut flow = Flow::new(key, Some(packet.mac), socket, State::Connecting, isn, shared.now);
        flow.rcv_nxt = tcp.seq.wrapping_add(1);
        flow.rcv_edge = flow.rcv_nxt;
        flow.snd_wnd = tcp.window.into();
        learn_options(&mut flow, tcp);
        if let Some(id) = self.add(flow, shared.events)
            && done
        {
            self.connected(id);
        }
    }

    fn add(&mut self, flow: Flow, events: &Events) -> Option<u32> {
        let key = flow.key;
        let Entry::Vacant(entry) = self.index.entry(key) else { return None };
        let memory = flow.memory();
        let id = self.flows.insert(flow);
        entry.insert(id);
        self.memory += memory;
        let socket = self.flows.get(id)?.socket.as_fd();
        let wanted = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        if events.add(socket, Events::TCP, id, wanted).is_err() {
            self.remove(id, true);
            return None;
        }
        Some(id)
    }

    fn connected(&mut self, id: u32) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        flow.state = State::SynReceived;
        flow.writable = true;
        flow.ack_due = true;
        self.queue(id);
    }

    /// A connection from outside to a forwarded port: the guest is asked whether it wants it.
    pub(super) fn accept(
        &mut self,
        socket: OwnedFd,
        guest: (IpAddr, u16),
        peer: (IpAddr, u16),
        shared: &mut Shared<'_>,
    ) {
        if self.flows.len() >= self.most {
            shared.limit("TCP connections");
            sys::reset_on_close(socket.as_fd());
            return;
        }
        let mut key = Key { guest: guest.0, guest_port: guest.1, peer: peer.0, peer_port: peer.1 };
        // Two forwards may lead to one port of the guest's, and their peers look alike to it.
        for _ in 0..64 {
            if !self.index.contains_key(&key) {
                break;
            }
            key.peer_port = 32768 | self.secret.hash_one((key, self.started.elapsed())) as u16;
        }
        let isn = self.isn(&key);
        let mut flow = Flow::new(key, None, socket, State::SynSent, isn, shared.now);
        options(&flow.socket);
        flow.writable = true;
        flow.readable = true;
        flow.ack_due = true;
        if let Some(id) = self.add(flow, shared.events) {
            self.queue(id);
        }
    }

    /// Something happened to a socket.
    pub(super) fn event(&mut self, id: u32, what: EventFlags, shared: &mut Shared<'_>) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        if flow.state == State::Connecting {
            if !what.intersects(EventFlags::OUT | EventFlags::ERR | EventFlags::HUP) {
                return;
            }
            match sys::socket_error(flow.socket.as_fd()) {
                Ok(()) => self.connected(id),
                Err(e) => {
                    let (mac, key, seq) = (flow.mac, flow.key, flow.rcv_nxt.wrapping_sub(1));
                    self.remove(id, false);
                    if let Some(mac) = mac {
                        fail(shared, mac, &key, seq, &e);
                    }
                    return;
                }
            }
        }
        let Some(flow) = self.flows.get_mut(id) else { return };
        flow.readable |=
            what.intersects(EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR);
        flow.writable |= what.intersects(EventFlags::OUT | EventFlags::ERR | EventFlags::HUP);
        flow.hangup |= what.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR);
        self.queue(id);
    }

    /// Timers that are due.
    pub(super) fn tick(&mut self, shared: &mut Shared<'_>) {
        while let Some(Reverse((at, id))) = self.timers.peek().copied()
            && at <= shared.now
        {
            self.timers.pop();
            let Some(flow) = self.flows.get_mut(id).filter(|f| f.timer_queued) else { continue };
            flow.timer_queued = false;
            match flow.timer {
                None => {}
                Some(due) if due > shared.now => self.arm(id, Some(due)),
                Some(_) => {
                    flow.timer = None;
                    flow.tries += 1;
                    if flow.timeout().is_none() {
                        self.abort(id, shared.lan);
                        continue;
                    }
                    flow.probe = flow.snd_wnd == 0;
                    flow.snd_nxt = flow.snd_una;
                    flow.ack_due |= !flow.is_open();
                    self.queue(id);
                }
            }
        }
    }

    /// Gives each connection with something to do its turn. Returns whether all of them had what they wanted.
    pub(super) fn run(&mut self, to: &mut dyn Receiver, shared: &mut Shared<'_>) -> bool {
        // One round: who is not done comes again in the next.
        for _ in 0..self.ready.len() {
            let Some(id) = self.ready.pop_front() else { break };
            let short = self.memory > BUDGET;
            let Some(flow) = self.flows.get_mut(id) else { continue };
            flow.queued = false;
            let memory = flow.memory();
            let turn = Self::turn(flow, to, shared, short);
            self.memory = (self.memory + flow.memory()).saturating_sub(memory);
            let out = flow.snd_una != flow.snd_max || !flow.is_open() && flow.state != State::Connecting;
            let waits = out || flow.ring.len() > 0;
            let timeout = flow.timeout();
            match (waits, flow.timer) {
                (true, None) => self.arm(id, timeout.map(|t| shared.now + t)),
                (false, Some(_)) => self.arm(id, None),
                _ => {}
            }
            match turn {
                Ok(Turn::Idle) => {}
                Ok(Turn::Again) => self.queue(id),
                Ok(Turn::Over) => self.remove(id, false),
                Ok(Turn::Full) => {
                    self.queue(id);
                    // It was its turn: it is first when there is room again.
                    if let Some(back) = self.ready.pop_back() {
                        self.ready.push_front(back);
                    }
                    return false;
                }
                Err(Ended::ByGuest) => self.remove(id, true),
                Err(Ended::ByHost) => self.abort(id, shared.lan),
            }
        }
        true
    }

    fn turn(
        flow: &mut Flow,
        to: &mut dyn Receiver,
        shared: &mut Shared<'_>,
        short: bool,
    ) -> Result<Turn, Ended> {
        let lan = &mut *shared.lan;
        match flow.state {
            State::Connecting => return Ok(Turn::Idle),
            State::SynReceived | State::SynSent => {
                return Ok(if !flow.ack_due || Self::send_syn(flow, lan, to, short) {
                    Turn::Idle
                } else {
                    Turn::Full
                });
            }
            State::Open => {}
        }
        Self::unspill(flow)?;
        let mut read = 0;
        let mut again = false;
        loop {
            if flow.readable && !flow.eof && read < TURN {
                read += Self::read(flow, TURN - read, short)?;
            }
            again |= read >= TURN && flow.readable && !flow.eof;
            match Self::send_data(flow, lan, to, short) {
                None => return Ok(Turn::Full),
                Some(0) => break,
                Some(_) if flow.readable && !flow.eof && read < TURN => {}
                Some(_) => break,
            }
        }
        let (_, unsent) = flow.split();
        let fin_now = flow.eof && unsent == 0 && flow.snd_nxt == flow.data_end() && !flow.fin_acked;
        if fin_now {
            let header = Self::header(flow, flag::FIN | flag::ACK, flow.snd_nxt, short);
            if !send_segment(lan, to, flow, &header, 0, 0) {
                return Ok(Turn::Full);
            }
            flow.fin = Some(flow.snd_nxt);
            flow.snd_nxt = flow.snd_nxt.wrapping_add(1);
            flow.snd_max = flow.snd_nxt;
            flow.ack_due = false;
        }
        if flow.wants_update() && !flow.guest_fin {
            let old = flow.rcv_edge;
            flow.window(short);
            flow.ack_due |= old != flow.rcv_edge;
        }
        if flow.ack_due {
            let header = Self::header(flow, flag::ACK, flow.snd_nxt, short);
            if !send_segment(lan, to, flow, &header, 0, 0) {
                return Ok(Turn::Full);
            }
            flow.ack_due = false;
        }
        if flow.ring.len() == 0 && flow.ring.capacity() > 0 && !flow.readable {
            flow.ring.release();
        }
        Ok(match (flow.is_done(), again) {
            (true, _) => Turn::Over,
            (false, true) => Turn::Again,
            (false, false) => Turn::Idle,
        })
    }

    fn send_syn(flow: &mut Flow, lan: &mut Lan, to: &mut dyn Receiver, short: bool) -> bool {
        if flow.mac.is_none() {
            flow.mac = lan.find(flow.key.guest);
        }
        let reply = flow.state == State::SynReceived;
        if flow.mac.is_some() {
            let mss = lan.mtu - ip::header_len(flow.key.guest) - crate::wire::tcp::LEN;
            let flags = if reply { flag::SYN | flag::ACK } else { flag::SYN };
            let window = flow.window(short);
            let header = Header {
                // The window of a SYN is not scaled.
                window: if reply {
                    (u32::from(window) << flow.snd_scale.map_or(0, |_| SCALE)).min(65535) as u16
                } else {
                    65535
                },
                mss: Some(mss as u16), // the MTU is 16 bits
                scale: (!reply || flow.snd_scale.is_some()).then_some(SCALE),
                ..Self::header(flow, flags, flow.snd_una, short)
            };
            if !send_segment(lan, to, flow, &header, 0, 0) {
                return false;
            }
        }
        flow.snd_nxt = flow.snd_una.wrapping_add(1);
        flow.snd_max = flow.snd_nxt;
        flow.ack_due = false;
        true
    }

    /// Gives the kernel what it refused before.
    fn unspill(flow: &mut Flow) -> Result<(), Ended> {
        if !flow.writable || flow.spill.is_empty() {
            return Ok(());
        }
        while flow.spilled() > 0 {
            match rustix::net::send(
                &flow.socket,
                &flow.spill[flow.spill_done..],
                rustix::net::SendFlags::NOSIGNAL | rustix::net::SendFlags::DONTWAIT,
            ) {
                Ok(n) => flow.spill_done += n,
                Err(rustix::io::Errno::AGAIN) => {
                    flow.writable = false;
                    return Ok(());
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return Err(Ended::ByHost),
            }
        }
        flow.spill = Vec::new();
        flow.spill_done = 0;
        flow.ack_due = true; // the window opens again
        if flow.guest_fin && !flow.shut {
            Self::shut(flow);
        }
        Ok(())
    }

    /// Reads from the socket into the ring.
    fn read(flow: &mut Flow, most: usize, short: bool) -> Result<usize, Ended> {
        if flow.ring.free() < flow.ring.capacity() / 2 || flow.ring.capacity() == 0 {
            // Large only for those who use it.
            let keep_small = short && flow.ring.capacity() > 0;
            if !keep_small {
                flow.ring.grow();
            }
        }
        let free = flow.ring.free().min(most);
        if free == 0 {
            return Ok(0);
        }
        match flow.ring.receive(flow.socket.as_fd(), most) {
            Ok(0) => {
                flow.eof = true;
                Ok(0)
            }
            Ok(n) => {
                // Fewer than asked for: there were no more, and epoll tells when there are.
                if n < free && !flow.hangup {
                    flow.readable = false;
                }
                Ok(n)
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                flow.readable = false;
                Ok(0)
            }
            Err(_) => Err(Ended::ByHost),
        }
    }

    /// Sends what the guest has room for; returns how much, or `None` if it has no buffers.
    fn send_data(flow: &mut Flow, lan: &mut Lan, to: &mut dyn Receiver, short: bool) -> Option<usize> {
        let mss = usize::from(flow.mss);
        let headers = ip::header_len(flow.key.guest) + crate::wire::tcp::LEN;
        let large = lan.offloads.contains(match flow.key.guest {
            IpAddr::V4(_) => Offloads::TSO4,
            IpAddr::V6(_) => Offloads::TSO6,
        });
        let most = if large {
            let most = (LARGEST - headers).min(to.largest().saturating_sub(LINK + headers));
            (most / mss * mss).max(mss)
        } else {
            mss
        };
        let mut total = 0;
        loop {
            let (sent, unsent) = flow.split();
            let mut room = flow.room() as usize;
            if std::mem::take(&mut flow.probe) && room == 0 {
                room = 1;
            }
            let len = unsent.min(room).min(most);
            // A little at a time only if the window will not grow by itself (RFC 9293, 3.8.6.2.1).
            if len == 0 || len < mss && len < unsent && sent > 0 {
                return Some(total);
            }
            let push = if len == unsent { flag::PSH } else { 0 };
            let header = Self::header(flow, flag::ACK | push, flow.snd_nxt, short);
            if !send_segment(lan, to, flow, &header, sent, len) {
                return None;
            }
            flow.ack_due = false;
            flow.snd_nxt = flow.snd_nxt.wrapping_add(len as u32); // at most 64 KiB
            if before(flow.snd_max, flow.snd_nxt) {
                flow.snd_max = flow.snd_nxt;
            }
            total += len;
        }
    }

    fn header(flow: &mut Flow, flags: u8, seq: u32, short: bool) -> Header {
        Header {
            src: flow.key.peer_port,
            dst: flow.key.guest_port,
            seq,
            ack: if flags & flag::ACK != 0 { flow.rcv_nxt } else { 0 },
            flags,
            window: flow.window(short),
            header: 0,
            mss: None,
            scale: None,
        }
    }

    /// Ends connections that nobody has used for long, so that new ones find room.
    pub(super) fn expire(&mut self, now: Instant, lan: &mut Lan) {
        let idle: Vec<u32> = self
            .flows
            .iter()
            .filter(|(_, f)| now.duration_since(f.used) > super::TCP_IDLE)
            .map(|(id, _)| id)
            .collect();
        for id in idle {
            // A connection with keep-alives is not idle: they come through here.
            self.abort(id, lan);
        }
    }
}

/// How a connection ended before its time.
#[derive(Debug)]
enum Ended {
    ByGuest,
    ByHost,
}

fn learn_options(flow: &mut Flow, tcp: &Header) {
    flow.mss = tcp.mss.unwrap_or(536).clamp(88, 65000);
    flow.snd_scale = tcp.scale;
}

/// Options of every socket that carries a connection; it works without them too.
fn options(socket: &OwnedFd) {
    // The guest's own stack decides what to send together.
    let _ = rustix::net::sockopt::set_tcp_nodelay(socket, true);
    let _ = rustix::net::sockopt::set_socket_oobinline(socket, true);
}

fn connect(to: SocketAddr) -> io::Result<(OwnedFd, bool)> {
    let socket = sys::socket(to.ip(), SocketType::STREAM, None)?;
    options(&socket);
    let done = sys::connect(&socket, to)?;
    Ok((socket, done))
}

/// Answers what belongs to no connection (RFC 9293, 3.10.7.1).
fn refuse(lan: &mut Lan, mac: MacAddr, key: &Key, tcp: &Header, len: usize) {
    let span = len as u32 + u32::from(tcp.flags & flag::SYN != 0) + u32::from(tcp.flags & flag::FIN != 0);
    let acks = tcp.flags & flag::ACK != 0;
    let header = Header {
        src: key.peer_port,
        dst: key.guest_port,
        seq: if acks { tcp.ack } else { 0 },
        ack: if acks { 0 } else { tcp.seq.wrapping_add(span) },
        flags: if acks { flag::RST } else { flag::RST | flag::ACK },
        window: 0,
        header: 0,
        mss: None,
        scale: None,
    };
    queue_segment(lan, mac, key, &header);
}

/// Tells the guest why its connection cannot be made.
fn fail(shared: &mut Shared<'_>, mac: MacAddr, key: &Key, seq: u32, error: &io::Error) {
    let why = match error.raw_os_error() {
        Some(libc::ENETUNREACH | libc::EADDRNOTAVAIL | libc::EAFNOSUPPORT) => Unreachable::Network,
        Some(libc::EHOSTUNREACH | libc::ETIMEDOUT) => Unreachable::Host,
        Some(libc::EACCES | libc::EPERM) => Unreachable::Prohibited,
        other => {
            if matches!(other, Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM)) {
                shared.limit(&format!("sockets ({error})"));
            }
            let syn = Header {
                src: key.guest_port,
                dst: key.peer_port,
                seq,
                ack: 0,
                flags: flag::SYN,
                window: 0,
                header: 0,
                mss: None,
                scale: None,
            };
            return refuse(shared.lan, mac, key, &syn, 0);
        }
    };
    // The start of the guest's segment, as far as errors quote it.
    let mut original = [0; 64];
    let at = ip::write(&mut original, key.guest, key.peer, protocol::TCP, 64, crate::wire::tcp::LEN);
    original[at..at + 2].copy_from_slice(&key.guest_port.to_be_bytes());
    original[at + 2..at + 4].copy_from_slice(&key.peer_port.to_be_bytes());
    original[at + 4..at + 8].copy_from_slice(&seq.to_be_bytes());
    shared.lan.unreachable(mac, why, &original[..at + 8]);
}

/// Queues a segment without data.
fn queue_segment(lan: &mut Lan, mac: MacAddr, key: &Key, header: &Header) {
    let mut b = [0; 32];
    let len = header.write(&mut b);
    let sum = pseudo_header(key.peer, key.guest, protocol::TCP, len).bytes(&b[..len]).finish();
    b[16..18].copy_from_slice(&sum.to_be_bytes());
    lan.ip(mac, key.peer, key.guest, protocol::TCP, super::lan::TTL, &b[..len]);
}

/// Gives the guest a segment with `len` bytes of the ring from `at` on; `false` if it has no room.
fn send_segment(
    lan: &Lan,
    to: &mut dyn Receiver,
    flow: &Flow,
    header: &Header,
    at: usize,
    len: usize,
) -> bool {
    let Some(mac) = flow.mac else { return true };
    let key = &flow.key;
    let mut b = [0; LINK + ip::V6_LEN + 32];
    let mut options = [0; 32];
    let header_len = header.write(&mut options);
    let start = lan.headers(&mut b, mac, key.peer, key.guest, protocol::TCP, header_len + len);
    b[start..start + header_len].copy_from_slice(&options[..header_len]);
    let total = start + header_len + len;
    if total > to.largest() {
        return true; // a guest whose buffers are too small for its own segments
    }
    let Some(room) = to.reserve(total) else { return false };
    let (x, y) = flow.ring.slices(at, len);
    let sum = pseudo_header(key.peer, key.guest, protocol::TCP, header_len + len);
    let mut vnet = VnetHeader::default();
    let sum = if lan.offloads.contains(Offloads::CSUM) {
        vnet.flags = VnetHeader::NEEDS_CSUM;
        vnet.csum_start = (start - VnetHeader::LEN) as u16;
        vnet.csum_offset = 16;
        if len > usize::from(flow.mss) {
            vnet.gso_type = if key.guest.is_ipv4() { VnetHeader::GSO_TCPV4 } else { VnetHeader::GSO_TCPV6 };
            vnet.gso_size = flow.mss;
            vnet.hdr_len = (start - VnetHeader::LEN + header_len) as u16;
        }
        sum.partial()
    } else {
        let head = sum.bytes(&b[start..start + header_len]).bytes(x);
        if x.len() % 2 == 0 {
            head.bytes(y).finish()
        } else {
            // The second piece starts at an odd place: its sum counts with its bytes swapped (RFC 1071, 2 (B)).
            head.word(Sum::default().bytes(y).partial().swap_bytes()).finish()
        }
    };
    b[start + 16..start + 18].copy_from_slice(&sum.to_be_bytes());
    b[..VnetHeader::LEN].copy_from_slice(&vnet.to_bytes());
    room.write(0, &b[..start + header_len]);
    room.write(start + header_len, x);
    room.write(start + header_len + x.len(), y);
    to.commit(total);
    true
}
