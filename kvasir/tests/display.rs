//! A person at the guest's screen: what the console shows, and keys typed one by one, over VNC.
#![allow(clippy::unwrap_used)] // a test that cannot set itself up may panic

mod common;

use common::{Run, guest, kvasir};
use std::collections::HashSet;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

/// A viewer without a screen of its own: raw pixels, keysyms.
struct Viewer(UnixStream);

impl Viewer {
    fn connect(path: &Path) -> (Self, (u16, u16)) {
        let deadline = Instant::now() + Duration::from_secs(60);
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(e) => assert!(Instant::now() < deadline, "no server: {e}"),
            }
            std::thread::sleep(Duration::from_millis(50));
        };
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut v = Self(stream);
        assert_eq!(v.read(12), b"RFB 003.008\n");
        v.0.write_all(b"RFB 003.008\n").unwrap();
        assert_eq!(v.read(2), [1, 1]);
        v.0.write_all(&[1]).unwrap();
        assert_eq!(v.read(4), [0; 4]);
        v.0.write_all(&[1]).unwrap();
        let size = (v.u16(), v.u16());
        v.read(16);
        let name = u32::from_be_bytes(v.read(4).try_into().unwrap());
        v.read(name as usize);
        (v, size)
    }

    fn read(&mut self, n: usize) -> Vec<u8> {
        let mut out = vec![0; n];
        self.0.read_exact(&mut out).unwrap();
        out
    }

    fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.read(2).try_into().unwrap())
    }

    fn type_text(&mut self, text: &str) {
        for c in text.chars() {
            let keysym = if c == '\n' { 0xff0d } else { u32::from(c) };
            for down in [1, 0] {
                let mut message = vec![4, down, 0, 0];
                message.extend(keysym.to_be_bytes());
                self.0.write_all(&message).unwrap();
            }
        }
    }

    /// The whole picture.
    fn capture(&mut self, (w, h): (u16, u16)) -> Vec<[u8; 4]> {
        let mut message = vec![3, 0, 0, 0, 0, 0];
        message.extend(w.to_be_bytes());
        message.extend(h.to_be_bytes());
        self.0.write_all(&message).unwrap();
        let mut picture = vec![[0; 4]; usize::from(w) * usize::from(h)];
        let mut got = 0;
        while got < picture.len() {
            assert_eq!(self.read(2), [0, 0]);
            for _ in 0..self.u16() {
                let [x, y, rw, rh] = [0; 4].map(|_| usize::from(self.u16()));
                assert_eq!(self.read(4), [0; 4], "raw");
                for row in y..y + rh {
                    for (i, pixel) in self.read(rw * 4).as_chunks::<4>().0.iter().enumerate() {
                        picture[row * usize::from(w) + x + i] = *pixel;
                    }
                }
                got += rw * rh;
            }
        }
        picture
    }
}

/// Whether some row of characters of 9 by 16 pixels has three different ones twice, one after the other.
fn has_twice_three(picture: &[[u8; 4]], width: usize) -> bool {
    let cell = |row: usize, column: usize| -> Vec<bool> {
        let at = |y: usize, x: usize| picture[(row * 16 + y) * width + column * 9 + x] != [0; 4];
        (0..16).flat_map(|y| (0..9).map(move |x| (y, x))).map(|(y, x)| at(y, x)).collect()
    };
    (0..25).any(|row| {
        let cells: Vec<_> = (0..80).map(|column| cell(row, column)).collect();
        cells.windows(6).any(|six| {
            let lit = six.iter().all(|c| c.contains(&true));
            let different: HashSet<_> = six[..3].iter().collect();
            lit && different.len() == 3 && six[..3] == six[3..]
        })
    })
}

#[test]
#[ignore = "needs the guest: cargo xtask guest"]
fn a_shell_on_the_vga_console() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("vnc");
    let (kernel, initrd) = (guest("bzImage"), guest("initramfs.cpio"));
    let display = format!("vnc=unix:{}", socket.display());
    let mut command = kvasir(&[
        "run",
        "--accel",
        "soft",
        "--kernel",
        &kernel,
        "--initrd",
        &initrd,
        "--display",
        &display,
        "--append",
        "console=ttyS0 console=tty0 quiet panic=-1",
    ]);
    command.stdin(Stdio::piped());
    let mut run = Run::start(command, Duration::from_secs(300));
    let (mut viewer, size) = Viewer::connect(&socket);
    assert_eq!(size, (720, 400));
    // Typed until the shell is there to read it; the answer comes by the serial port.
    run.wait_doing("ANSWER-42", |_| viewer.type_text("\necho ANSWER-$((6*7)) XyzXyz | tee /dev/ttyS0\n"));
    let deadline = Instant::now() + Duration::from_secs(60);
    while !has_twice_three(&viewer.capture(size), 720) {
        assert!(Instant::now() < deadline, "what was typed is not on the screen");
    }
    viewer.type_text("\npoweroff -f\n");
    let end = run.finish();
    assert_eq!(end.status, Some(0), "{}\n{}", end.stdout, end.stderr);
}
