//! Requests to an image that somebody damaged, on purpose or not.

use crate::data;
use crate::files::{Content, File, Files};
use crate::input::{Input, Mutation, Op, Place, Value};
use crate::ops::{REOPENED_MAX, Session, flags};
use crate::shapes;
use std::ops::Range;
use vellum::{Buf, Disk, Result, Storage, WriteFlags, ZeroMode};

/// Bytes of space that a file of one run may grow by. (A hole may be as long as the file system allows.)
pub(crate) const GROWTH_MAX: u64 = 48 << 20;
/// Bytes of one request: the disk may seem to be of any size.
const REQUEST_MAX: u64 = 256 << 10;

/// Damages the image, opens it, sends it the requests; with `check`, checks what that leaves.
pub(crate) fn run(mut session: Session, input: &Input, skip_checks: bool, check: bool) {
    for mutation in &input.mutations {
        mutate(&session.files, mutation);
    }
    if input.is_sealed {
        shapes::seal(session.shape, &session.files);
    }
    let before = contents(&session.files);
    let opened = session.open(skip_checks);
    let is_same =
        session.files.list().iter().zip(&before).all(|(file, before)| file.content().is_same(before));
    assert!(is_same, "{}: opening changed a file", session.shape.name);
    if let Ok(disk) = opened {
        requests(&mut session, disk, &input.ops);
    }
    if check {
        let checked = contents(&session.files);
        // What it finds is its affair.
        let _ = session.check();
        let all = session.files.list().iter().zip(&checked);
        assert!(
            all.into_iter().all(|(file, before)| file.content().is_same(before)),
            "checking changed a file"
        );
    }
    for (file, before) in session.files.list().iter().zip(&before) {
        let is_parent = file.name().starts_with(shapes::PARENTS);
        assert!(!is_parent || file.content().is_same(before), "{} was changed", file.name());
    }
}

fn contents(files: &Files) -> Vec<Content> {
    files.list().iter().map(|file| file.content()).collect()
}

fn requests(session: &mut Session, mut disk: Disk, ops: &[Op]) {
    let mut reopened = 0;
    for op in ops {
        // What fails, fails; it is the last state that counts.
        let _ = apply(&disk, op, session.grain);
        match *op {
            Op::Reopen { clean } if reopened < REOPENED_MAX => {
                reopened += 1;
                let _ = if clean { disk.close().wait() } else { disk.flush_all().wait() };
                match session.open(true) {
                    Ok(again) => disk = again,
                    Err(_) => return,
                }
            }
            Op::Flags(bits) => session.flags = flags(bits),
            _ => {}
        }
    }
    let _ = disk.close().wait();
}

fn apply(disk: &Disk, op: &Op, grain: u64) -> Result<()> {
    let size = disk.size().min(1 << 62);
    if size == 0 {
        return Ok(());
    }
    let short = |range: Range<u64>| range.start..range.end.min(range.start + REQUEST_MAX);
    match *op {
        Op::Write { at, choice, fua } => {
            let range = short(at.range(size, grain));
            let mut buf = Buf::zeroed((range.end - range.start) as usize);
            data::fill(&mut buf, range.start, choice);
            disk.write(buf, range.start, WriteFlags { fua }).wait().1
        }
        Op::Zero { at, unmap } => {
            let mode = if unmap { ZeroMode::MayUnmap } else { ZeroMode::KeepAllocated };
            disk.write_zeroes(short(at.range(size, grain)), mode).wait()
        }
        Op::Discard { at } => disk.discard_range(short(at.range(size, grain))).wait(),
        Op::Read { at } => {
            let range = short(at.range(size, grain));
            disk.read_at(Buf::zeroed((range.end - range.start) as usize), range.start).wait().1
        }
        Op::Flush => disk.flush_all().wait(),
        Op::Flags(bits) => disk.set_flags(flags(bits)),
        Op::Reopen { .. } => Ok(()),
    }
}

fn mutate(files: &Files, mutation: &Mutation) {
    let list = files.list();
    let file: &File = &list[mutation.file.min(list.len() - 1)];
    let mut content = file.content();
    let len = content.len();
    let at = match mutation.place {
        Place::Head(at) => u64::from(at),
        Place::Tail(back) => len.saturating_sub(u64::from(back)),
        Place::Anywhere(at) => (u128::from(at) * u128::from(len) >> 32) as u64,
        Place::Page(page, entry) => content.page_at(page.into()) + u64::from(entry & 0x1ff) * 8,
    };
    let bytes: &[u8] = match mutation.value {
        Value::Byte(byte) => &[byte],
        Value::Flip(bits) => {
            let mut byte = [0];
            content.read(&mut byte, at);
            &[byte[0] ^ bits]
        }
        Value::Word(word) => &word.to_le_bytes(),
        Value::WordBe(word) => &word.to_be_bytes(),
        Value::Long(long) => &long.to_le_bytes(),
        Value::LongBe(long) => &long.to_be_bytes(),
        Value::Sectors(count) => &(u64::from(count) * 512).to_be_bytes(),
        Value::Small(number) => &u32::from(number).to_le_bytes(),
    };
    if at + bytes.len() as u64 <= len {
        content.write(bytes, at);
        file.set_content(content);
    }
}
