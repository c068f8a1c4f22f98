//! Other tools, and what is compared with them. A missing tool fails the test with the package that has it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Runs a program that must be there; its exit code is the caller's affair.
pub fn run(program: &str, package: &str, args: &[&str]) -> Output {
    Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|e| panic!("{program} is needed for this test (Debian package {package}): {e}"))
}

/// Runs a program that must succeed; its standard output.
pub fn run_ok(program: &str, package: &str, args: &[&str]) -> String {
    let output = run(program, package, args);
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(
        output.status.success(),
        "{program} {} failed with {}:\n{stdout}\n{stderr}",
        args.join(" "),
        output.status
    );
    stdout.into_owned()
}

/// Runs `qemu-img`, which must succeed; its standard output.
pub fn qemu_img(args: &[&str]) -> String {
    run_ok("qemu-img", "qemu-utils", args)
}

/// Runs `qemu-img` in a directory, for names that are to be stored as they are given.
pub fn qemu_img_in(directory: &Path, args: &[&str]) -> String {
    let output = Command::new("qemu-img")
        .args(args)
        .current_dir(directory)
        .output()
        .unwrap_or_else(|e| panic!("qemu-img is needed for this test (Debian package qemu-utils): {e}"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "qemu-img {}: {stderr}", args.join(" "));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs `qemu-io` commands on an image.
pub fn qemu_io(format: &str, image: &Path, commands: &[&str]) -> String {
    let mut args = vec!["-f", format];
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(text(image));
    let out = run_ok("qemu-io", "qemu-utils", &args);
    assert!(!out.contains("failed"), "qemu-io {args:?}: {out}");
    out
}

/// What QEMU is told to open: the format is given, and so is the data file `disk.data` beside a QCOW2 image, whose
/// stored name QEMU takes relative to the working directory of the process and not of the image.
pub fn qemu_image(image: &Path, format: &str) -> String {
    let mut opts = format!("driver={format},file.driver=file,file.filename={}", text(image));
    let data = image.with_file_name("disk.data");
    if format == "qcow2" && data.exists() {
        opts += &format!(",data-file.driver=file,data-file.filename={}", text(&data));
    }
    opts
}

/// Converts an image to raw with QEMU.
pub fn qemu_to_raw(image: &Path, format: &str, raw: &Path) {
    qemu_img(&["convert", "--image-opts", "-O", "raw", &qemu_image(image, format), text(raw)]);
}

/// Asserts that QEMU sees the same disk in both images.
pub fn assert_qemu_same(left: (&Path, &str), right: (&Path, &str)) {
    let (left, right) = (qemu_image(left.0, left.1), qemu_image(right.0, right.1));
    let args = ["compare", "--image-opts", &left, &right];
    let output = run("qemu-img", "qemu-utils", &args);
    assert!(
        output.status.success(),
        "qemu-img {}: {}{}",
        args.join(" "),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Size and SHA-256 of what libyal's reader for `module` (`pyvmdk`, `pyvhdi`, `pyqcow`) sees of an image.
pub fn libyal_digest(module: &str, image: &Path) -> (u64, String) {
    const SCRIPT: &str = r#"
import hashlib, importlib, sys
module = importlib.import_module(sys.argv[1])
names = {"pyvmdk": "handle", "pyvhdi": "file", "pyqcow": "file"}
image = getattr(module, names[sys.argv[1]])()
image.open(sys.argv[2])
if sys.argv[1] == "pyvmdk":
    image.open_extent_data_files()
size = image.get_media_size()
digest = hashlib.sha256()
done = 0
while done < size:
    image.seek(done)
    part = image.read_buffer(min(1 << 20, size - done))
    if not part:
        sys.exit("short read at %d of %d" % (done, size))
    digest.update(part)
    done += len(part)
print(size, digest.hexdigest())
"#;
    let package = match module {
        "pyvmdk" => "python3-libvmdk",
        "pyvhdi" => "python3-libvhdi",
        _ => "python3-libqcow",
    };
    // Debian's own interpreter: other Pythons on a machine do not see Debian's modules.
    let out =
        run_ok("/usr/bin/python3", &format!("python3 and {package}"), &["-c", SCRIPT, module, text(image)]);
    let mut words = out.split_whitespace();
    let size = words.next().and_then(|word| word.parse().ok());
    let digest = words.next().map(str::to_owned);
    match (size, digest) {
        (Some(size), Some(digest)) => (size, digest),
        _ => panic!("{module} printed {out:?}"),
    }
}

/// A path as text.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap_or_else(|| panic!("{} is not UTF-8", path.display()))
}

/// Builds the command `vellum` and tells where it is.
///
/// Cargo gives the paths of binaries only to tests of the same package, so it is asked.
pub fn vellum_binary() -> PathBuf {
    static BUILT: std::sync::OnceLock<PathBuf> = std::sync::OnceLock::new();
    BUILT
        .get_or_init(|| {
            let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
            let output = Command::new(cargo)
                .args(["build", "-q", "-p", "vellum-cli", "--bins", "--message-format=json"])
                .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
                .output()
                .expect("running cargo");
            let messages = String::from_utf8_lossy(&output.stdout);
            assert!(
                output.status.success(),
                "building vellum-cli: {}",
                String::from_utf8_lossy(&output.stderr)
            );
            let built = messages
                .lines()
                .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
                .filter_map(|message| message.get("executable")?.as_str().map(PathBuf::from));
            built
                .into_iter()
                .find(|path| path.file_name().is_some_and(|name| name == "vellum"))
                .expect("cargo built no binary with the name vellum")
        })
        .clone()
}
