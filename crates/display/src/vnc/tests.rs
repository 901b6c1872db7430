//! A server, and viewers that are made by hand.

use super::encode::tests::Decoder;
use super::server::{Options, Server};
use super::*;
use crate::input::{Event, Kind, Sink};
use crate::{Canvas, Displays};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A screen whose rows are numbers from a first on.
struct Rows(Mutex<(u32, u32, u32)>);

impl crate::Source for Rows {
    fn refresh(&self, canvas: &mut Canvas) {
        let (w, h, first) = *self.0.lock().unwrap();
        canvas.set_size(w, h);
        for y in 0..h {
            let n = (first + y) * 0x0103;
            let row: Vec<u32> = (0..w).map(|x| (n + x / 40 * (n & 7)) & 0xff_ffff).collect();
            canvas.draw(0, y, &row);
        }
    }
    fn suggest_size(&self, width: u32, height: u32) -> bool {
        let mut s = self.0.lock().unwrap();
        (s.0, s.1) = (width, height);
        true
    }
}

#[derive(Default)]
struct Log(Mutex<Vec<Event>>);

impl Sink for Log {
    fn events(&self, events: &[Event]) {
        self.0.lock().unwrap().extend(events);
    }
}

struct Bench {
    server: Server,
    displays: Arc<Displays>,
    rows: Arc<Rows>,
    keys: Arc<Log>,
    tablet: Arc<Log>,
}

fn bench(change: impl FnOnce(&mut Options)) -> Bench {
    let displays = Arc::new(Displays::new().unwrap());
    let rows = Arc::new(Rows(Mutex::new((200, 100, 0))));
    displays.add("test", rows.clone());
    let (keys, tablet) = (Arc::new(Log::default()), Arc::new(Log::default()));
    displays.input().add(Kind::Keyboard, 0, &keys);
    displays.input().add(Kind::Tablet, 1, &tablet);
    let mut options = Options { display: "127.0.0.1:40".into(), to: Some(900), ..Options::default() };
    change(&mut options);
    Bench { server: Server::start(&displays, options).unwrap(), displays, rows, keys, tablet }
}

struct Client(TcpStream);

impl Client {
    fn connect(bench: &Bench) -> Self {
        let s = TcpStream::connect(bench.server.address()).unwrap();
        s.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Self(s)
    }
    fn read(&mut self, n: usize) -> Vec<u8> {
        let mut out = vec![0; n];
        self.0.read_exact(&mut out).unwrap();
        out
    }
    fn send(&mut self, data: &[u8]) {
        self.0.write_all(data).unwrap();
    }
    fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.read(2).try_into().unwrap())
    }
    fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.read(4).try_into().unwrap())
    }
    fn version(&mut self, version: &str) {
        assert_eq!(self.read(12), b"RFB 003.008\n");
        self.send(format!("RFB {version}\n").as_bytes());
    }
    /// Lets itself in and returns the size.
    fn enter(bench: &Bench) -> (Self, (u16, u16)) {
        let mut c = Self::connect(bench);
        c.version("003.008");
        assert_eq!(c.read(2), [1, 1]);
        c.send(&[1]);
        assert_eq!(c.read(4), [0; 4]);
        let size = c.init();
        (c, size)
    }
    fn init(&mut self) -> (u16, u16) {
        self.send(&[1]);
        let size = (self.u16(), self.u16());
        assert_eq!(self.read(16), PixelFormat::default().to_bytes());
        let n = self.u32() as usize;
        assert_eq!(self.read(n), b"Kvasir");
        size
    }
    fn encodings(&mut self, list: &[i32]) {
        let mut m = vec![2, 0];
        m.extend((list.len() as u16).to_be_bytes());
        list.iter().for_each(|e| m.extend(e.to_be_bytes()));
        self.send(&m);
    }
    fn request(&mut self, incremental: bool, w: u16, h: u16) {
        let mut m = vec![3, incremental.into(), 0, 0, 0, 0];
        m.extend(w.to_be_bytes());
        m.extend(h.to_be_bytes());
        self.send(&m);
    }
    /// Header of an update: number of rectangles.
    fn update(&mut self) -> u16 {
        assert_eq!(self.read(2), [0, 0]);
        self.u16()
    }
    fn rect(&mut self) -> ([u16; 4], i32) {
        ([self.u16(), self.u16(), self.u16(), self.u16()], self.u32() as i32)
    }
}

fn wanted(w: u32, y: u32, first: u32) -> Vec<u32> {
    let n = (first + y) * 0x0103;
    (0..w).map(|x| (n + x / 40 * (n & 7)) & 0xff_ffff).collect()
}

#[test]
fn versions_and_passwords() {
    let open = bench(|_| {});
    for version in ["003.003", "003.007", "003.008"] {
        let mut c = Client::connect(&open);
        c.version(version);
        match version {
            "003.003" => assert_eq!(c.u32(), 1),
            _ => {
                assert_eq!(c.read(2), [1, 1]);
                c.send(&[1]);
                if version == "003.008" {
                    assert_eq!(c.u32(), 0);
                }
            }
        }
        assert_eq!(c.init(), (200, 100), "{version}");
    }
    let closed = bench(|o| o.initial_password = Some("secret".into()));
    for (password, result) in [("secret", 0), ("wrong", 1), ("", 1)] {
        for version in ["003.003", "003.008"] {
            let mut c = Client::connect(&closed);
            c.version(version);
            if version == "003.003" {
                assert_eq!(c.u32(), 2);
            } else {
                assert_eq!(c.read(2), [1, 2]);
                c.send(&[2]);
            }
            let challenge = c.read(16).try_into().unwrap();
            c.send(&super::auth::response(password, &challenge));
            assert_eq!(c.u32(), result, "{password} {version}");
            if result == 0 {
                assert_eq!(c.init(), (200, 100));
            }
        }
    }
    // Without a password set nobody knows the right one.
    closed.server.set_password(None);
    let waiting = bench(|o| o.password = true);
    let mut c = Client::connect(&waiting);
    c.version("003.008");
    assert_eq!(c.read(2), [1, 2]);
    c.send(&[2]);
    let challenge = c.read(16).try_into().unwrap();
    c.send(&super::auth::response("", &challenge));
    assert_eq!(c.u32(), 1);
}

#[test]
fn updates_scrolls_and_sizes() {
    let b = bench(|_| {});
    let (mut c, size) = Client::enter(&b);
    assert_eq!(size, (200, 100));
    c.encodings(&[0, 1, -308]);
    c.request(false, 200, 100);
    assert_eq!(c.update(), 2);
    assert_eq!(c.rect(), ([0, 0, 200, 100], -308));
    c.read(20);
    let (rect, encoding) = c.rect();
    assert_eq!((rect, encoding), ([0, 0, 200, 100], 0));
    let raw = c.read(200 * 100 * 4);
    assert_eq!(raw[200 * 4 * 7..][..4], wanted(200, 7, 0)[0].to_le_bytes());
    // Asked for incrementally, an update comes once something changes; rows that moved are copied.
    c.request(true, 200, 100);
    b.rows.0.lock().unwrap().2 = 25;
    c.request(true, 200, 100);
    let mut number = c.update();
    let (rect, encoding) = c.rect();
    assert_eq!((rect, encoding), ([0, 0, 200, 75], 1));
    assert_eq!((c.u16(), c.u16()), (0, 25));
    while number > 1 {
        number -= 1;
        let (rect, encoding) = c.rect();
        assert!(encoding == 0 && rect[1] >= 75);
        c.read(usize::from(rect[2]) * usize::from(rect[3]) * 4);
    }
    // The viewer asks for another size.
    c.send(&[251, 0, 1, 0x40, 0, 0xf0, 1, 0]);
    c.send(&[0; 16]);
    c.request(true, 200, 100);
    let mut seen = Vec::new();
    while !seen.contains(&([0, 0, 320, 240], -308)) {
        for _ in 0..c.update() {
            let (rect, encoding) = c.rect();
            c.read(if encoding == -308 { 20 } else { usize::from(rect[2]) * usize::from(rect[3]) * 4 });
            seen.push((rect, encoding));
        }
        c.request(true, 200, 100);
    }
    assert!(seen.iter().any(|(r, e)| *e == -308 && r[0] == 1 && r[1] == 0), "{seen:?}");
}

#[test]
fn continuous_updates_fences_and_lights() {
    let b = bench(|_| {});
    let (mut c, _) = Client::enter(&b);
    c.encodings(&[16, -312, -313, -261, -258]);
    // The server's fence, and the sign that it knows continuous updates.
    assert_eq!(c.read(9), [248, 0, 0, 0, 0x80, 0, 0, 0, 0]);
    assert_eq!(c.read(1), [150]);
    c.send(&[248, 0, 0, 0, 0x80, 0, 0, 3, 2, b'h', b'i']);
    assert_eq!(c.read(11), [248, 0, 0, 0, 0, 0, 0, 3, 2, b'h', b'i']);
    c.send(&[150, 1, 0, 0, 0, 0, 0, 200, 0, 100]);
    assert_eq!(c.update(), 3);
    assert_eq!(c.rect().1, -258);
    assert_eq!(c.rect().1, -261);
    assert_eq!(c.read(1), [0]);
    let (rect, encoding) = c.rect();
    assert_eq!((rect, encoding), ([0, 0, 200, 100], 16));
    let n = c.u32();
    let data = c.read(n as usize);
    let mut whole = Vec::new();
    rect.iter().for_each(|v| whole.extend(v.to_be_bytes()));
    whole.extend(16u32.to_be_bytes());
    whole.extend(n.to_be_bytes());
    whole.extend(data);
    let mut picture = vec![0; 200 * 100];
    Decoder::default().rect(&PixelFormat::default(), &whole, &mut picture, 200);
    assert_eq!(picture[200 * 99..], wanted(200, 99, 0));
    b.displays.input().set_leds(crate::input::Leds { caps: true, ..Default::default() });
    assert_eq!(c.update(), 1);
    assert_eq!(c.rect().1, -261);
    assert_eq!(c.read(1), [4]);
}

#[test]
fn input_and_clipboard() {
    let b = bench(|_| {});
    let (mut c, _) = Client::enter(&b);
    let (mut other, _) = Client::enter(&b);
    c.send(&[4, 1, 0, 0, 0, 0, 0, b'a']);
    c.send(&[255, 0, 0, 1, 0, 0, 0, b'b', 0, 0, 0, 0x30]);
    c.send(&[5, 1, 0, 150, 0, 99]);
    c.send(&[6, 0, 0, 0, 0, 0, 0, 2, b'h', b'i']);
    assert_eq!(other.read(10), [3, 0, 0, 0, 0, 0, 0, 2, b'h', b'i']);
    use crate::input::{Button, Key};
    assert_eq!(*b.keys.0.lock().unwrap(), [Event::Key(Key(30), true), Event::Key(Key(48), true)]);
    let at = Event::Position { at: (150, 99), size: (200, 100) };
    assert_eq!(*b.tablet.0.lock().unwrap(), [at, Event::Button(Button::Left, true)]);
    // Who leaves lets go of what was held.
    drop(c);
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while b.displays.input().is_down(Key(30)) || b.displays.input().is_down(Key(48)) {
        assert!(std::time::Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn viewers_that_misbehave_disturb_nobody() {
    let b = bench(|_| {});
    // Connections that say nothing are bounded: the oldest go.
    let silent: Vec<_> = (0..300).map(|_| TcpStream::connect(b.server.address()).unwrap()).collect();
    // One that asks for everything and reads nothing.
    let (mut deaf, _) = Client::enter(&b);
    for _ in 0..2000 {
        deaf.request(false, 200, 100);
        if deaf
            .0
            .write_all(&[248, 0, 0, 0, 0x80, 0, 0, 0, 64])
            .and_then(|()| deaf.0.write_all(&[0; 64]))
            .is_err()
        {
            break;
        }
    }
    // Nonsense.
    let (mut mad, _) = Client::enter(&b);
    mad.send(&[77; 100]);
    let mut rest = Vec::new();
    mad.0.read_to_end(&mut rest).ok();
    // Sizes beyond the screen, and formats that are none.
    let (mut greedy, _) = Client::enter(&b);
    greedy.request(false, 0xffff, 0xffff);
    greedy.update();
    let (mut odd, _) = Client::enter(&b);
    odd.send(&[0, 0, 0, 0, 7, 9, 1, 1, 0, 0, 0, 0, 0, 0, 99, 99, 99, 0, 0, 0]);
    odd.0.read_to_end(&mut rest).ok();
    // Everyone else is served.
    let (mut c, size) = Client::enter(&b);
    assert_eq!(size, (200, 100));
    c.request(false, 200, 100);
    assert!(c.update() > 0);
    drop(silent);
}

#[test]
fn exclusive_viewers_send_others_away() {
    let b = bench(|_| {});
    let (mut first, _) = Client::enter(&b);
    let mut c = Client::connect(&b);
    c.version("003.008");
    c.read(2);
    c.send(&[1]);
    c.read(4);
    c.send(&[0]);
    assert_eq!(c.u16(), 200);
    assert_eq!(first.0.read(&mut [0; 10]).unwrap(), 0);
}

#[test]
fn websockets_and_pages() {
    let b = bench(|o| o.websocket = Some("127.0.0.1:0".into()));
    let address = b.server.websocket().unwrap().to_owned();
    let mut s = TcpStream::connect(&address).unwrap();
    s.write_all(b"GET /websockify HTTP/1.1\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: binary\r\n\r\n").unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        s.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    assert!(head.starts_with(b"HTTP/1.1 101"));
    let mut frame = [0; 14];
    s.read_exact(&mut frame).unwrap();
    assert_eq!(&frame, b"\x82\x0cRFB 003.008\n");
    let mask = [1, 2, 3, 4];
    let mut reply = vec![0x82, 0x80 | 12, 1, 2, 3, 4];
    reply.extend(b"RFB 003.008\n".iter().enumerate().map(|(i, c)| c ^ mask[i % 4]));
    s.write_all(&reply).unwrap();
    let mut frame = [0; 4];
    s.read_exact(&mut frame).unwrap();
    assert_eq!(frame, [0x82, 2, 1, 1]);
    // Without an upgrade it is a web server of a few files.
    let mut s = TcpStream::connect(&address).unwrap();
    s.write_all(b"GET /../../etc/passwd HTTP/1.1\r\n\r\n").unwrap();
    let mut answer = String::new();
    s.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
}

#[test]
fn wrong_options() {
    let displays = Arc::new(Displays::new().unwrap());
    let start = |options: Options| Server::start(&displays, options).err().unwrap().to_string();
    assert!(start(Options::default()).contains("--vga std"));
    displays.add("x", Arc::new(Rows(Mutex::new((8, 8, 0)))));
    assert!(start(Options { display: "here".into(), ..Options::default() }).contains("HOST:N"));
    let busy = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = busy.local_addr().unwrap().port();
    if let Some(number) = port.checked_sub(5900) {
        let text = start(Options { display: format!("127.0.0.1:{number}"), ..Options::default() });
        assert!(text.contains("cannot listen"), "{text}");
    }
}
