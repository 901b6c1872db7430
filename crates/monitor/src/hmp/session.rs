//! The human monitor on a terminal or socket.

use super::Shell;
use super::line::{Editor, Outcome};
use crate::Context;
use crate::context::lock;
use crate::output::Output;
use bus::{CharEvent, CharFrontend, Chardev};
use std::sync::{Arc, Mutex, Weak};

const PROMPT: &str = "(qemu) ";

struct Session {
    context: Weak<Context>,
    output: Arc<Output>,
    state: Mutex<State>,
}

struct State {
    editor: Editor,
    cpu: u32,
    /// Input comes here (on a multiplexer it may go elsewhere).
    focused: bool,
    greeted: bool,
}

pub(crate) fn serve(context: &Arc<Context>, chardev: Arc<dyn Chardev>) -> std::io::Result<()> {
    let output = Output::start(chardev.clone())?;
    let state = State { editor: Editor::default(), cpu: 0, focused: true, greeted: false };
    let session = Session { context: Arc::downgrade(context), output, state: Mutex::new(state) };
    chardev.attach(Arc::new(session));
    Ok(())
}

impl Drop for Session {
    fn drop(&mut self) {
        self.output.close();
    }
}

impl CharFrontend for Session {
    fn receive(&self, data: &[u8]) -> usize {
        for &byte in data {
            let mut out = String::new();
            let outcome = lock(&self.state).editor.key(byte, &mut out);
            self.show(&out);
            match outcome {
                Outcome::None => {}
                Outcome::Line(line) => self.line(&line),
                Outcome::Complete(text) => self.complete(&text),
            }
        }
        data.len()
    }

    fn event(&self, event: CharEvent) {
        match event {
            CharEvent::Opened => {
                let mut state = lock(&self.state);
                state.editor = Editor::default();
                state.greeted = false;
                let focused = state.focused;
                drop(state);
                if focused {
                    self.greet();
                }
            }
            CharEvent::Closed => self.output.discard(),
            CharEvent::Focused => {
                lock(&self.state).focused = true;
                self.greet();
            }
            CharEvent::Unfocused => {
                lock(&self.state).focused = false;
            }
            _ => {}
        }
    }
}

impl Session {
    fn show(&self, text: &str) {
        if !text.is_empty() {
            self.output.answer(text.replace('\n', "\r\n").replace("\r\r\n", "\r\n").into_bytes());
        }
    }

    fn greet(&self) {
        let mut out = String::new();
        let mut state = lock(&self.state);
        if !std::mem::replace(&mut state.greeted, true) {
            let (major, minor, micro) = crate::qmp::VERSION;
            out = format!(
                "QEMU {major}.{minor}.{micro} monitor ({}) - type 'help' for more information\n",
                crate::qmp::PACKAGE
            );
        } else {
            out.push('\n');
        }
        out += PROMPT;
        state.editor.redraw(&mut out);
        drop(state);
        self.show(&out);
    }

    fn line(&self, line: &str) {
        let Some(context) = self.context.upgrade() else { return };
        let mut shell = Shell::new(&context);
        shell.cpu = lock(&self.state).cpu;
        let text = shell.run(line);
        lock(&self.state).cpu = shell.cpu;
        self.show(&text);
        self.show(PROMPT);
    }

    fn complete(&self, text: &str) {
        let Some(context) = self.context.upgrade() else { return };
        let (at, words) = Shell::new(&context).complete(text);
        let part = &text[at..];
        let mut out = String::new();
        let common = common_prefix(&words);
        let mut state = lock(&self.state);
        if words.len() == 1 {
            state.editor.insert(&format!("{} ", &words[0][part.len()..]), &mut out);
        } else if common.len() > part.len() {
            state.editor.insert(&common[part.len()..], &mut out);
        } else if words.len() > 1 {
            out = format!("\n{}\n{PROMPT}", columns(&words));
            state.editor.redraw(&mut out);
        }
        drop(state);
        self.show(&out);
    }
}

fn common_prefix(words: &[String]) -> &str {
    let Some(first) = words.first() else { return "" };
    let mut len = first.len();
    for w in words {
        len = first.bytes().zip(w.bytes()).take(len).take_while(|(a, b)| a == b).count();
    }
    first.get(..len).unwrap_or_default()
}

fn columns(words: &[String]) -> String {
    let width = words.iter().map(String::len).max().unwrap_or(0) + 2;
    let per_line = (78 / width).max(1);
    let lines: Vec<String> = words
        .chunks(per_line)
        .map(|row| row.iter().map(|w| format!("{w:<width$}")).collect::<String>().trim_end().to_owned())
        .collect();
    lines.join("\n")
}
