//! The stack, driven by a guest that makes its packets by hand.

use super::*;
use crate::sys;
use crate::testing::{Cable, Got, MAC};
use crate::wire::ndp;
use crate::wire::tcp::{Tcp as Header, flag};
use std::io::{Read, Write};
use std::net::{Ipv6Addr, Shutdown, TcpListener, TcpStream, UdpSocket};

const GATEWAY: MacAddr = MacAddr([0x52, 0x55, 10, 0, 2, 2]);
const GUEST: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 2, 15));
const HOST: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 2, 2));
const DNS: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 2, 3));

fn cable(change: impl FnOnce(&mut Spec)) -> Cable<UserPort> {
    let mut spec = Spec { host_loopback: true, ..Spec::default() };
    change(&mut spec);
    Cable::new(UserPort::new(&spec).unwrap(), GATEWAY)
}

/// One end of a connection, in the guest.
struct Socket {
    us: (IpAddr, u16),
    them: (IpAddr, u16),
    seq: u32,
    ack: u32,
    window: u16,
    /// What came, in order.
    data: Vec<u8>,
    fin: bool,
    reset: bool,
    /// Window that we were given last.
    their_window: u32,
    their_ack: u32,
    largest: usize,
}

impl Socket {
    fn new(us: (IpAddr, u16), them: (IpAddr, u16)) -> Self {
        Self {
            us,
            them,
            seq: 1000,
            ack: 0,
            window: 0xffff,
            data: Vec::new(),
            fin: false,
            reset: false,
            their_window: 0,
            their_ack: 0,
            largest: 0,
        }
    }

    fn header(&self, flags: u8) -> Header {
        Header {
            src: self.us.1,
            dst: self.them.1,
            seq: self.seq,
            ack: self.ack,
            flags,
            window: self.window,
            header: 0,
            mss: None,
            scale: None,
        }
    }

    fn send(&mut self, cable: &mut Cable<UserPort>, flags: u8, payload: &[u8]) {
        let header = self.header(flags);
        cable.send_tcp(self.us.0, self.them.0, &header, payload);
        self.seq += payload.len() as u32 + u32::from(flags & flag::FIN != 0);
    }

    /// Connects from the guest.
    fn connect(cable: &mut Cable<UserPort>, port: u16, to: (IpAddr, u16)) -> Self {
        let mut s = Self::new((if to.0.is_ipv4() { GUEST } else { guest6() }, port), to);
        let syn = Header { mss: Some(1460), scale: Some(2), ..s.header(flag::SYN) };
        cable.send_tcp(s.us.0, s.them.0, &syn, &[]);
        s.seq += 1;
        let got = cable.next_ip("an answer to SYN");
        let (tcp, _) = got.tcp();
        assert_eq!((tcp.src, tcp.dst, tcp.ack), (s.them.1, s.us.1, s.seq));
        if tcp.flags & flag::RST != 0 {
            s.reset = true;
            return s;
        }
        assert_eq!(tcp.flags, flag::SYN | flag::ACK);
        assert!(tcp.mss.is_some() && tcp.scale.is_some());
        s.ack = tcp.seq.wrapping_add(1);
        s.send(cable, flag::ACK, &[]);
        s
    }

    /// Takes what has come; acknowledges if told so.
    fn pump(&mut self, cable: &mut Cable<UserPort>, acknowledge: bool) {
        cable.port.receive(&mut cable.inbox).unwrap();
        let mut any = false;
        while let Some(frame) = cable.inbox.frames.pop_front() {
            let Some(got) = Got::parse(&frame) else { continue };
            let (tcp, payload) = got.tcp();
            if tcp.dst != self.us.1 {
                continue;
            }
            assert_eq!((got.ip.src, tcp.src), self.them);
            if tcp.flags & flag::RST != 0 {
                self.reset = true;
                continue;
            }
            self.their_ack = tcp.ack;
            self.their_window = u32::from(tcp.window) << 4;
            self.largest = self.largest.max(payload.len());
            if got.vnet.gso_type != VnetHeader::GSO_NONE {
                assert!(payload.len() > usize::from(got.vnet.gso_size));
            }
            any |= !payload.is_empty() || tcp.flags & flag::FIN != 0;
            if tcp.seq == self.ack {
                self.ack = self.ack.wrapping_add(payload.len() as u32);
                self.data.extend_from_slice(payload);
                if tcp.flags & flag::FIN != 0 {
                    self.fin = true;
                    self.ack = self.ack.wrapping_add(1);
                }
            }
        }
        if any && acknowledge {
            self.send(cable, flag::ACK, &[]);
        }
    }
}

fn guest6() -> IpAddr {
    "fec0::15".parse().unwrap()
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32).flat_map(|i| i.wrapping_mul(2654435761).to_be_bytes()).take(len).collect()
}

#[test]
fn arp_answers_for_our_addresses_only() {
    let mut c = cable(|_| ());
    for (target, ours) in
        [([10, 0, 2, 2], true), ([10, 0, 2, 3], true), ([10, 0, 2, 15], false), ([10, 0, 2, 9], false)]
    {
        let request = arp::Arp {
            operation: arp::REQUEST,
            sender_mac: MAC,
            sender: [10, 0, 2, 15].into(),
            target_mac: MacAddr::default(),
            target: target.into(),
        };
        c.send_ethernet(MacAddr::BROADCAST, ethertype::ARP, &request.to_bytes());
        let reply = c.inbox.frames.pop_front().and_then(|f| arp::Arp::parse(&f[26..]));
        assert_eq!(reply.map(|r| (r.sender, r.sender_mac)), ours.then_some((target.into(), GATEWAY)));
    }
}

fn dhcp_message(kind: u8, more: &[u8]) -> Vec<u8> {
    let mut b = vec![0; 240];
    b[..3].copy_from_slice(&[1, 1, 6]);
    b[28..34].copy_from_slice(&MAC.0);
    b[236..].copy_from_slice(&[0x63, 0x82, 0x53, 0x63]);
    b.extend_from_slice(&[53, 1, kind]);
    b.extend_from_slice(more);
    b.push(255);
    b
}

#[test]
fn dhcp_gives_an_address() {
    let mut c = cable(|s| {
        s.hostname = Some("box".into());
        s.dnssearch = vec!["example.org".into()];
    });
    let any = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    let all = IpAddr::V4(Ipv4Addr::BROADCAST);
    let mut ask = |message: &[u8]| {
        let gateway = std::mem::replace(&mut c.gateway, MacAddr::BROADCAST);
        c.send_udp((any, 68), (all, 67), message);
        c.gateway = gateway;
        let got = c.next_ip("a DHCP answer");
        let options = got.payload[8 + 240..].to_vec();
        let yours: [u8; 4] = got.payload[8 + 16..8 + 20].try_into().unwrap();
        (yours, options)
    };
    let (yours, options) = ask(&dhcp_message(1, &[]));
    assert_eq!((yours, &options[..3]), ([10, 0, 2, 15], &[53, 1, 2][..]));
    let has = |wanted: &[u8]| options.windows(wanted.len()).any(|w| w == wanted);
    assert!(has(&[3, 4, 10, 0, 2, 2]) && has(&[6, 4, 10, 0, 2, 3]) && has(&[1, 4, 255, 255, 255, 0]));
    assert!(has(b"\x0c\x03box") && has(b"\x77\x0d\x07example\x03org\x00"));
    let (yours, options) = ask(&dhcp_message(3, &[50, 4, 10, 0, 2, 15, 54, 4, 10, 0, 2, 2]));
    assert_eq!((yours, &options[..3]), ([10, 0, 2, 15], &[53, 1, 5][..]));
    let (yours, options) = ask(&dhcp_message(3, &[50, 4, 10, 0, 2, 99]));
    assert_eq!((yours, &options[..3]), ([0, 0, 0, 0], &[53, 1, 6][..]), "another's address is refused");
}

#[test]
fn the_gateway_answers_pings_and_bad_checksums_are_dropped() {
    let mut c = cable(|_| ());
    let mut ping = vec![8, 0, 0, 0, 0x12, 0x34, 0, 1, b'h', b'i'];
    icmp::finish(&mut ping, GUEST, HOST);
    c.send_ip(GUEST, HOST, protocol::ICMP, 64, &ping);
    let got = c.next_ip("a reply");
    assert_eq!((got.ip.src, got.payload[0], &got.payload[4..]), (HOST, 0, &ping[4..]));
    ping[9] ^= 1;
    c.send_ip(GUEST, HOST, protocol::ICMP, 64, &ping);
    c.expect_silence();
}

#[test]
fn connections_carry_data_both_ways_and_close() {
    for (v6, tso) in [(false, false), (false, true), (true, true)] {
        let listener = TcpListener::bind(if v6 { "[::1]:0" } else { "127.0.0.1:0" }).unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut c = cable(|_| ());
        if tso {
            c.port.set_offloads(Offloads::CSUM | Offloads::TSO4 | Offloads::TSO6).unwrap();
        }
        let (up, down) = (pattern(300_000), pattern(3_000_000));
        let (want, answer) = (up.clone(), down.clone());
        let server = std::thread::spawn(move || {
            let (mut s, _) = listener.accept().unwrap();
            let mut got = Vec::new();
            s.read_to_end(&mut got).unwrap();
            assert!(got == want, "what the guest sent");
            s.write_all(&answer).unwrap();
        });
        let to = if v6 { "fec0::2".parse().unwrap() } else { HOST };
        let mut s = Socket::connect(&mut c, 40000, (to, port));
        assert!(!s.reset);
        for piece in up.chunks(1400) {
            s.send(&mut c, flag::ACK, piece);
            s.pump(&mut c, true);
        }
        s.send(&mut c, flag::ACK | flag::FIN, &[]);
        c.until("the end", |c| {
            s.pump(c, true);
            s.fin.then_some(())
        });
        server.join().unwrap();
        assert!(s.data == down, "{} bytes", s.data.len());
        assert_eq!(s.their_ack, s.seq);
        assert_eq!(s.largest > 1460, tso, "{}", s.largest);
        assert_eq!(c.port.connections(), 0);
        // What comes after the end is refused.
        s.send(&mut c, flag::ACK, b"late");
        s.pump(&mut c, false);
        assert!(s.reset);
    }
}

#[test]
fn lost_segments_come_again() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut c = cable(|_| ());
    let mut s = Socket::connect(&mut c, 40000, (HOST, port));
    let (mut server, _) = listener.accept().unwrap();
    let data = pattern(100_000);
    server.write_all(&data).unwrap();
    c.until("segments", |c| (c.inbox.frames.len() >= 8).then_some(()));
    // The third is lost: what follows it is answered by duplicates, which bring all of it again.
    c.inbox.frames.remove(2);
    let later = c.inbox.frames.len() - 2;
    s.pump(&mut c, false);
    assert_eq!(s.data.len(), 2 * 1460);
    for _ in 0..later {
        s.send(&mut c, flag::ACK, &[]);
    }
    c.until("the rest", |c| {
        s.pump(c, true);
        (s.data.len() == data.len()).then_some(())
    });
    assert!(s.data == data);
    // And without any answer they come again by time.
    server.write_all(b"last").unwrap();
    c.until("a segment", |c| c.inbox.frames.pop_front());
    c.until("it again", |c| {
        s.pump(c, true);
        (s.data.len() == data.len() + 4).then_some(())
    });
    // The guest's own come twice, and out of order.
    s.send(&mut c, flag::ACK, b"one");
    s.seq -= 3;
    s.send(&mut c, flag::ACK, b"one");
    s.seq += 3;
    s.send(&mut c, flag::ACK, b"three");
    s.seq -= 8;
    s.send(&mut c, flag::ACK, b"twothree");
    let mut got = [0; 11];
    server.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"onetwothree");
}

#[test]
fn a_stalled_reader_stops_the_sender() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut c = cable(|_| ());
    let mut s = Socket::connect(&mut c, 40000, (HOST, port));
    let (mut server, _) = listener.accept().unwrap();
    s.their_window = 65535;
    s.their_ack = s.seq;
    let data = pattern(16 << 20);
    let mut sent = 0;
    // The guest sends until its window is used up.
    loop {
        let edge = s.their_ack.wrapping_add(s.their_window);
        let room = edge.wrapping_sub(s.seq) as usize;
        if room == 0 {
            break;
        }
        let n = room.min(1400).min(data.len() - sent);
        assert!(n > 0, "the window never closed");
        s.send(&mut c, flag::ACK, &data[sent..sent + n]);
        sent += n;
        s.pump(&mut c, false);
    }
    // More is not taken.
    let ack = s.their_ack;
    s.send(&mut c, flag::ACK, b"too much");
    s.seq -= 8;
    s.pump(&mut c, false);
    assert_eq!(s.their_ack, ack);
    // The reader goes on, and all arrives.
    let want = data[..sent].to_vec();
    let reader = std::thread::spawn(move || {
        let mut got = vec![0; want.len()];
        server.read_exact(&mut got).unwrap();
        assert!(got == want);
        server
    });
    c.until("an open window", |c| {
        s.pump(c, false);
        (s.their_window > 100_000).then_some(())
    });
    reader.join().unwrap();
}

#[test]
fn a_closed_window_is_respected_and_probed() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut c = cable(|_| ());
    let mut s = Socket::connect(&mut c, 40000, (HOST, port));
    let (mut server, _) = listener.accept().unwrap();
    s.window = 0;
    s.send(&mut c, flag::ACK, &[]);
    server.write_all(b"hello").unwrap();
    c.until("a probe", |c| {
        s.pump(c, false);
        (s.data == b"h").then_some(())
    });
    s.window = 1000;
    s.send(&mut c, flag::ACK, &[]);
    c.until("the rest", |c| {
        s.pump(c, true);
        (s.data == b"hello").then_some(())
    });
}

#[test]
fn a_guest_without_buffers_loses_nothing() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut c = cable(|_| ());
    let mut s = Socket::connect(&mut c, 40000, (HOST, port));
    let (mut server, _) = listener.accept().unwrap();
    let data = pattern(50_000);
    server.write_all(&data).unwrap();
    server.shutdown(Shutdown::Write).unwrap();
    c.until("all of it", |c| {
        c.inbox.buffers = 1;
        s.pump(c, true);
        s.fin.then_some(())
    });
    assert!(s.data == data);
}

#[test]
fn refusals_and_resets_are_passed_on() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut c = cable(|_| ());
    // The peer resets.
    let mut s = Socket::connect(&mut c, 40001, (HOST, port));
    let (server, _) = listener.accept().unwrap();
    sys::reset_on_close(server.as_fd());
    drop(server);
    c.until("a reset", |c| {
        s.pump(c, false);
        s.reset.then_some(())
    });
    // The guest resets.
    let mut s = Socket::connect(&mut c, 40002, (HOST, port));
    let (mut server, _) = listener.accept().unwrap();
    s.send(&mut c, flag::RST, &[]);
    assert_eq!(server.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(c.port.connections(), 0);
    // Nobody listens.
    drop(listener);
    assert!(Socket::connect(&mut c, 40003, (HOST, port)).reset);
    // What may not be reached.
    for to in ["127.0.0.1", "0.0.0.0", "10.0.2.3", "10.0.2.99"] {
        assert!(Socket::connect(&mut c, 40004, (to.parse().unwrap(), port)).reset, "{to}");
    }
    let mut closed = cable(|s| s.host_loopback = false);
    assert!(Socket::connect(&mut closed, 40005, (HOST, port)).reset);
}

#[test]
fn connections_are_limited() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut c = cable(|s| s.max_connections = 3);
    let open = |c: &mut Cable<UserPort>, p| !Socket::connect(c, p, (HOST, port)).reset;
    assert!((1..=3).all(|p| open(&mut c, p)));
    assert!(!open(&mut c, 4));
}

#[test]
fn restricted_guests_reach_nothing_but_forwards() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let forward = format!("tcp:10.0.2.100:80-tcp:127.0.0.1:{port}");
    let mut c =
        cable(|s| (s.restrict, s.guestfwd) = (true, vec![forward, "tcp:10.0.2.101:7-cmd:cat".into()]));
    let syn = Socket::new((GUEST, 1), (HOST, port)).header(flag::SYN);
    c.send_tcp(GUEST, HOST, &syn, &[]);
    c.send_udp((GUEST, 5), (DNS, 53), b"query");
    c.expect_silence();
    assert!(!Socket::connect(&mut c, 2, ([10, 0, 2, 100].into(), 80)).reset);
    listener.accept().unwrap();
    let mut s = Socket::connect(&mut c, 3, ([10, 0, 2, 101].into(), 7));
    s.send(&mut c, flag::ACK, b"meow");
    c.until("an echo", |c| {
        s.pump(c, true);
        (s.data == b"meow").then_some(())
    });
}

#[test]
fn a_forwarded_port_leads_to_the_guest() {
    let mut c = cable(|s| s.hostfwd = vec!["tcp:127.0.0.1:0-:22".into()]);
    let at = rustix::net::getsockname(&c.port.forwards.listeners.get(0).unwrap().socket).unwrap();
    let mut client = TcpStream::connect(SocketAddr::try_from(at).unwrap()).unwrap();
    // The guest is looked for first.
    let frame = c.until("an ARP request", |c| c.inbox.frames.pop_front());
    let request = arp::Arp::parse(&frame[26..]).unwrap();
    assert_eq!((request.operation, request.target), (arp::REQUEST, Ipv4Addr::new(10, 0, 2, 15)));
    let reply = arp::Arp {
        operation: arp::REPLY,
        sender_mac: MAC,
        sender: request.target,
        target_mac: request.sender_mac,
        target: request.sender,
    };
    c.send_ethernet(GATEWAY, ethertype::ARP, &reply.to_bytes());
    let got = c.next_ip("a SYN");
    let (tcp, _) = got.tcp();
    assert_eq!(
        (got.ip.src, tcp.flags, tcp.dst, tcp.src),
        (HOST, flag::SYN, 22, client.local_addr().unwrap().port())
    );
    let mut s = Socket::new((GUEST, 22), (HOST, tcp.src));
    s.ack = tcp.seq.wrapping_add(1);
    let answer = Header { mss: Some(1460), scale: Some(0), ..s.header(flag::SYN | flag::ACK) };
    c.send_tcp(GUEST, HOST, &answer, &[]);
    s.seq += 1;
    client.write_all(b"ssh?").unwrap();
    c.until("a question", |c| {
        s.pump(c, true);
        (s.data == b"ssh?").then_some(())
    });
    s.send(&mut c, flag::ACK, b"yes");
    let mut got = [0; 3];
    client.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"yes");
}

#[test]
fn forwards_come_and_go_while_it_runs() {
    let mut c = cable(|_| ());
    let control = c.port.control.clone();
    let asker = std::thread::spawn(move || {
        control.add_host_forward("tcp:127.0.0.1:0-:22").unwrap();
        assert!(control.add_host_forward("tcp:127.0.0.1:0").is_err());
        assert!(control.remove_host_forward("tcp:127.0.0.1:1").is_err());
        control.remove_host_forward("tcp:127.0.0.1:0").unwrap();
    });
    c.until("the changes", |_| asker.is_finished().then_some(()));
    asker.join().unwrap();
    assert_eq!(c.port.forwards.listeners.len(), 0);
}

#[test]
fn datagrams_go_out_and_come_back() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let mut c = cable(|_| ());
    c.send_udp((GUEST, 5000), (HOST, port), b"ping");
    let mut buffer = [0; 4096];
    let (n, from) = server.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..n], b"ping");
    // A large answer comes in fragments.
    let answer = pattern(4000);
    server.send_to(&answer, from).unwrap();
    let mut parts = crate::wire::reassembly::Reassembly::default();
    let whole = c.until("fragments", |c| {
        let frame = c.inbox.frames.pop_front()?;
        let got = Got::parse(&frame)?;
        assert!(frame.len() <= 12 + 14 + 1500);
        parts.add(&got.ip, &got.payload, Instant::now())
    });
    assert_eq!((whole.1.len(), whole.1[8..] == answer), (4008, true));
    // And one in fragments goes out whole.
    let mut b = [5000, port, 3008, 0].map(u16::to_be_bytes).concat();
    b.extend_from_slice(&answer[..3000]);
    for (at, piece) in [(0, &b[..1480]), (1480, &b[1480..2960]), (2960, &b[2960..])] {
        let mut packet = vec![0; 20];
        ip::write(&mut packet, GUEST, HOST, protocol::UDP, 64, piece.len());
        let place = (at / 8) as u16 | if at < 2960 { 0x2000 } else { 0 };
        packet[6..8].copy_from_slice(&place.to_be_bytes());
        packet[10..12].fill(0);
        let sum = crate::wire::Sum::default().bytes(&packet).finish();
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        packet.extend_from_slice(piece);
        c.send_ethernet(GATEWAY, ethertype::IPV4, &packet);
    }
    let (n, _) = server.recv_from(&mut buffer).unwrap();
    assert!(buffer[..n] == answer[..3000]);
    // Nobody there: the guest is told.
    drop(server);
    c.send_udp((GUEST, 5000), (HOST, port), b"ping");
    let got = c.next_ip("an error");
    assert_eq!((got.ip.protocol, &got.payload[..2]), (protocol::ICMP, &[3, 3][..]));
    assert_eq!(got.payload[8 + 20..8 + 24], [5000u16.to_be_bytes(), port.to_be_bytes()].concat());
}

#[test]
fn names_are_asked_of_the_hosts_servers() {
    let server = UdpSocket::bind("127.0.0.1:53");
    let Ok(server) = server else { return }; // not ours to bind here
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "nameserver 127.0.0.1\n").unwrap();
    let port = UserPort::with_resolver(&Spec::default(), file.path().to_str().unwrap()).unwrap();
    let mut c = Cable::new(port, GATEWAY);
    c.send_udp((GUEST, 5353), (DNS, 53), b"query");
    let mut buffer = [0; 64];
    let (n, from) = server.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..n], b"query");
    server.send_to(b"answer", from).unwrap();
    let got = c.next_ip("an answer");
    assert_eq!((got.ip.src, &got.payload[8..]), (DNS, &b"answer"[..]));
}

#[test]
fn ipv6_hosts_find_their_router_and_servers() {
    let mut c = cable(|_| ());
    let us: Ipv6Addr = "fe80::5054:ff:fe12:3456".parse().unwrap();
    let routers: IpAddr = "ff02::2".parse().unwrap();
    let mut solicitation = vec![133, 0, 0, 0, 0, 0, 0, 0];
    icmp::finish(&mut solicitation, us.into(), routers);
    c.gateway = MacAddr([0x33, 0x33, 0, 0, 0, 2]);
    c.send_ip(us.into(), routers, protocol::ICMPV6, 255, &solicitation);
    let got = c.next_ip("an advertisement");
    assert_eq!((got.payload[0], got.ip.src, got.ip.ttl), (134, IpAddr::V6(v6::LINK_LOCAL), 255));
    let prefix = Ipv6Addr::from(crate::wire::array::<16>(&got.payload, 16 + 8 + 16));
    assert_eq!(prefix, "fec0::".parse::<Ipv6Addr>().unwrap());
    // Not if it crossed a router.
    c.send_ip(us.into(), routers, protocol::ICMPV6, 64, &solicitation);
    c.expect_silence();
    let (message, group, mac) = ndp::solicit("fec0::3".parse().unwrap(), us, MAC);
    c.gateway = mac;
    c.send_ip(us.into(), group.into(), protocol::ICMPV6, 255, &message);
    let got = c.next_ip("an advertisement");
    assert_eq!(
        ndp::Message::parse(&got.payload),
        Some(ndp::Message::Advertisement { target: "fec0::3".parse().unwrap(), mac: Some(GATEWAY) })
    );
    // DHCPv6: what else there is.
    c.gateway = MacAddr([0x33, 0x33, 0, 1, 0, 2]);
    let servers: IpAddr = "ff02::1:2".parse().unwrap();
    c.send_udp((us.into(), 546), (servers, 547), &[11, 0, 0, 7, 0, 1, 0, 2, 9, 9]);
    let got = c.next_ip("a DHCPv6 reply");
    let dns = "fec0::3".parse::<Ipv6Addr>().unwrap().octets();
    assert_eq!(got.payload[8..12], [7, 0, 0, 7]);
    assert!(got.payload.windows(16).any(|w| w == dns));
}

#[test]
fn tftp_serves_its_directory_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let data = pattern(2000);
    std::fs::write(dir.path().join("boot"), &data).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", dir.path().join("link")).unwrap();
    let mut c = cable(|s| s.tftp = Some(dir.path().into()));
    let mut ask = |message: &[u8]| {
        c.send_udp((GUEST, 2000), (HOST, 69), message);
        c.next_ip("an answer").payload[8..].to_vec()
    };
    assert_eq!(
        ask(b"\0\x01boot\0octet\0tsize\x000\0blksize\x001024\0"),
        b"\0\x06tsize\x002000\0blksize\x001024\0"
    );
    let first = ask(b"\0\x04\0\0");
    assert!(first[..4] == [0, 3, 0, 1] && first[4..] == data[..1024]);
    let last = ask(b"\0\x04\0\x01");
    assert!(last[..4] == [0, 3, 0, 2] && last[4..] == data[1024..]);
    for name in ["../etc/passwd", "/etc/passwd", "link", "missing", "."] {
        let answer = ask(&[b"\0\x01", name.as_bytes(), b"\0octet\0"].concat());
        assert_eq!(answer[..4], [0, 5, 0, 1], "{name}");
    }
    assert_eq!(ask(b"\0\x02boot\0octet\0")[..4], [0, 5, 0, 2]);
}

#[test]
fn any_frame_is_survived() {
    use proptest::prelude::*;
    let c = std::cell::RefCell::new(cable(|_| ()));
    let mut runner =
        proptest::test_runner::TestRunner::new(ProptestConfig { cases: 400, ..ProptestConfig::default() });
    let kinds = prop::sample::select(vec![0x0800u16, 0x0806, 0x86dd, 0x8100, 0]);
    let protocols = prop::sample::select(vec![1u8, 6, 17, 58, 44, 0]);
    let ports = prop::sample::select(vec![53u16, 67, 68, 69, 546, 547, 9]);
    let strategy = (
        kinds,
        protocols,
        ports,
        prop::collection::vec(any::<u8>(), 0..200),
        any::<[u8; 12]>(),
        any::<bool>(),
    );
    runner
        .run(&strategy, |(kind, number, port, tail, vnet, right)| {
            let mut b = vnet.to_vec();
            b.extend_from_slice(&MacAddr::BROADCAST.0);
            b.extend_from_slice(&MAC.0);
            b.extend_from_slice(&kind.to_be_bytes());
            if right {
                let (src, dst) =
                    if kind == 0x86dd { (guest6(), "fec0::2".parse().unwrap()) } else { (GUEST, HOST) };
                let mut header = vec![0; 40];
                let n = ip::write(&mut header, src, dst, number, 255, tail.len() + 4);
                b.extend_from_slice(&header[..n]);
                b.extend_from_slice(&port.to_be_bytes());
                b.extend_from_slice(&port.to_be_bytes());
            }
            b.extend_from_slice(&tail);
            let c = &mut *c.borrow_mut();
            c.port.send(&Frame::of(&b));
            c.port.receive(&mut c.inbox).unwrap();
            c.inbox.frames.clear();
            Ok(())
        })
        .unwrap();
}
