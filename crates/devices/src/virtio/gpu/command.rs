//! Commands of the driver (virtio 1.2, 5.7.6.7).

use super::adapter::{Adapter, MOST_HEADS};
use super::monitor;
use super::resource::{Format, MOST_PIECES};
use ::display::Rect;
use bus::virtio::QueueError;
use memory::GuestMemory;

const OK: u32 = 0x1100;
const OK_DISPLAY_INFO: u32 = 0x1101;
const OK_EDID: u32 = 0x1104;
const UNSPECIFIED: u32 = 0x1200;
const OUT_OF_MEMORY: u32 = 0x1201;
const INVALID_SCANOUT: u32 = 0x1202;
const INVALID_RESOURCE: u32 = 0x1203;
const INVALID_PARAMETER: u32 = 0x1205;

const FENCE: u32 = 1;

/// Fills a buffer with the next bytes of a request.
pub(super) type Fetch<'a> = dyn FnMut(&mut [u8]) -> Result<(), QueueError> + 'a;

/// Little-endian fields one after the other.
struct Fields<'f, 'a>(&'f mut Fetch<'a>);

impl Fields<'_, '_> {
    fn u32(&mut self) -> Result<u32, QueueError> {
        let mut raw = [0; 4];
        (self.0)(&mut raw)?;
        Ok(u32::from_le_bytes(raw))
    }

    fn u64(&mut self) -> Result<u64, QueueError> {
        let mut raw = [0; 8];
        (self.0)(&mut raw)?;
        Ok(u64::from_le_bytes(raw))
    }

    fn rect(&mut self) -> Result<Rect, QueueError> {
        Ok(Rect::new(self.u32()?, self.u32()?, self.u32()?, self.u32()?))
    }
}

/// What a command answers: a type, and what follows the header.
type Answer = Result<(u32, Vec<u8>), u32>;

/// Runs a command and returns the answer, header included.
///
/// # Errors
/// A request whose memory is not there.
pub(super) fn run(
    adapter: &mut Adapter,
    fetch: &mut Fetch<'_>,
    memory: &GuestMemory,
) -> Result<Vec<u8>, QueueError> {
    let mut header = [0; 24];
    match fetch(&mut header) {
        Ok(()) => {}
        Err(QueueError::TooShort) => return Ok(answer(UNSPECIFIED, &[0; 24], &[])),
        Err(e) => return Err(e),
    };
    let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    let result = match dispatch(adapter, kind, &mut Fields(fetch), memory) {
        Ok(result) => result,
        Err(QueueError::TooShort) => Err(INVALID_PARAMETER),
        Err(e) => return Err(e),
    };
    Ok(match result {
        Ok((kind, body)) => answer(kind, &header, &body),
        Err(error) => answer(error, &header, &[]),
    })
}

fn answer(kind: u32, request: &[u8; 24], body: &[u8]) -> Vec<u8> {
    let mut out = kind.to_le_bytes().to_vec();
    let fenced = u32::from(request[4]) & FENCE;
    out.extend(fenced.to_le_bytes());
    // Fence, context and ring come back.
    if fenced != 0 {
        out.extend_from_slice(&request[8..])
    } else {
        out.extend([0; 16])
    }
    out.extend_from_slice(body);
    out
}

fn dispatch(
    adapter: &mut Adapter,
    kind: u32,
    f: &mut Fields<'_, '_>,
    memory: &GuestMemory,
) -> Result<Answer, QueueError> {
    let done = || Ok((OK, Vec::new()));
    Ok(match kind {
        0x100 => Ok((OK_DISPLAY_INFO, display_info(adapter))),
        0x101 => {
            let (id, format, w, h) = (f.u32()?, f.u32()?, f.u32()?, f.u32()?);
            create(adapter, id, format, w, h).map(|()| (OK, Vec::new()))
        }
        0x102 => {
            if adapter.remove(f.u32()?) {
                done()
            } else {
                Err(INVALID_RESOURCE)
            }
        }
        0x103 => {
            let (rect, head, id) = (f.rect()?, f.u32()? as usize, f.u32()?);
            set_scanout(adapter, rect, head, id).map(|()| (OK, Vec::new()))
        }
        0x104 => {
            let (rect, id) = (f.rect()?, f.u32()?);
            match adapter.resources.get(&id) {
                None => Err(INVALID_RESOURCE),
                Some(r) if !r.contains(rect) => Err(INVALID_PARAMETER),
                Some(_) => {
                    adapter.flush(id, rect);
                    done()
                }
            }
        }
        0x105 => {
            let (rect, offset, id) = (f.rect()?, f.u64()?, f.u32()?);
            match adapter.resources.get_mut(&id) {
                None => Err(INVALID_RESOURCE),
                Some(r) if !r.contains(rect) || r.backing.is_empty() => Err(INVALID_PARAMETER),
                Some(r) => {
                    if r.transfer(memory, rect, offset) {
                        done()
                    } else {
                        Err(INVALID_PARAMETER)
                    }
                }
            }
        }
        0x106 => attach(adapter, f)?.map(|()| (OK, Vec::new())),
        0x107 => match adapter.resources.get_mut(&f.u32()?) {
            None => Err(INVALID_RESOURCE),
            Some(r) => {
                r.backing.clear();
                done()
            }
        },
        0x10a => {
            let head = f.u32()? as usize;
            match adapter.scanouts.get(head) {
                None => Err(INVALID_SCANOUT),
                Some(s) => {
                    let edid = monitor(s.wanted, head);
                    let mut body = (edid.len() as u32).to_le_bytes().to_vec();
                    body.extend([0; 4]);
                    body.extend(edid);
                    body.resize(8 + 1024, 0);
                    Ok((OK_EDID, body))
                }
            }
        }
        0x300 | 0x301 => {
            let (head, x, y, _) = (f.u32()? as usize, f.u32()?, f.u32()?, f.u32()?);
            let (id, hot) = (f.u32()?, (f.u32()?, f.u32()?));
            match adapter.scanouts.get_mut(head) {
                None => Err(INVALID_SCANOUT),
                Some(s) => {
                    s.pointer = (x, y);
                    if kind == 0x300 {
                        adapter.set_cursor(head, id, hot);
                    }
                    done()
                }
            }
        }
        _ => Err(UNSPECIFIED),
    })
}

fn display_info(adapter: &Adapter) -> Vec<u8> {
    let mut body = Vec::new();
    let mut x = 0u32;
    for i in 0..MOST_HEADS {
        let s = adapter.scanouts.get(i).filter(|s| s.enabled);
        let (w, h) = s.map_or((0, 0), |s| s.wanted);
        for n in [x, 0, w, h, u32::from(s.is_some()), 0] {
            body.extend(n.to_le_bytes());
        }
        x = x.saturating_add(w);
    }
    body
}

fn create(adapter: &mut Adapter, id: u32, format: u32, width: u32, height: u32) -> Result<(), u32> {
    if id == 0 || adapter.resources.contains_key(&id) {
        return Err(INVALID_RESOURCE);
    }
    let format = Format::from_number(format).ok_or(INVALID_PARAMETER)?;
    adapter
        .add(id, format, width, height)
        .map_err(|full| if full { OUT_OF_MEMORY } else { INVALID_PARAMETER })
}

fn set_scanout(adapter: &mut Adapter, rect: Rect, head: usize, id: u32) -> Result<(), u32> {
    if head >= adapter.heads() {
        return Err(INVALID_SCANOUT);
    }
    if id == 0 {
        adapter.show(head, None);
        return Ok(());
    }
    let resource = adapter.resources.get(&id).ok_or(INVALID_RESOURCE)?;
    if !resource.contains(rect) || rect.w < 16 || rect.h < 16 {
        return Err(INVALID_PARAMETER);
    }
    adapter.show(head, Some((id, rect)));
    Ok(())
}

fn attach(adapter: &mut Adapter, f: &mut Fields<'_, '_>) -> Result<Result<(), u32>, QueueError> {
    let (id, number) = (f.u32()?, f.u32()?);
    let Some(resource) = adapter.resources.get_mut(&id) else { return Ok(Err(INVALID_RESOURCE)) };
    if !resource.backing.is_empty() || number > MOST_PIECES {
        return Ok(Err(UNSPECIFIED));
    }
    let mut pieces = Vec::with_capacity(number as usize);
    for _ in 0..number {
        pieces.push((f.u64()?, f.u32()?));
        f.u32()?;
    }
    // Pieces of nothing would be looked through for ever.
    pieces.retain(|(_, length)| *length > 0);
    resource.backing = pieces;
    Ok(Ok(()))
}
