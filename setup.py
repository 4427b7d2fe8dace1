"Package metadata: every value is read from settings.ini; edit there, not here."
from configparser import ConfigParser
from pathlib import Path
import shlex, setuptools

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

def reqs(key): return shlex.split(cfg.get(key, '') or '', comments=True)

SUFFIX = '_requirements'
NATIVE = {'pip_requirements', 'conda_requirements'}
extras = {k[:-len(SUFFIX)]: reqs(k) for k in cfg if k.endswith(SUFFIX) and k not in NATIVE}
extras['all'] = sorted({r for k, v in extras.items() if k != 'dev' for r in v})

licenses = {'apache2': 'Apache-2.0', 'mit': 'MIT', 'bsd3': 'BSD-3-Clause'}
statuses = ['1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta',
            '5 - Production/Stable', '6 - Mature', '7 - Inactive']
lib = cfg['lib_path']

setuptools.setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'],
    keywords=cfg['keywords'], author=cfg['author'], author_email=cfg['author_email'],
    license=licenses.get(cfg['license'], cfg['license']), url=cfg['git_url'],
    classifiers=['Development Status :: ' + statuses[int(cfg['status'])-1],
                 'Intended Audience :: ' + cfg['audience'],
                 'Programming Language :: Python :: 3'],
    packages=setuptools.find_packages(include=[lib, lib + '.*']),
    package_data={lib: reqs('package_data')}, include_package_data=False,
    install_requires=reqs('requirements') + reqs('pip_requirements'),
    extras_require=extras, python_requires='>=' + cfg['min_python'],
    long_description=(here/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown', zip_safe=False,
    entry_points={'console_scripts': cfg.get('console_scripts', '').split(),
                  'nbdev': [f'{lib}={lib}._modidx:d']},
)
